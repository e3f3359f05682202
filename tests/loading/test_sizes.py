"""How large a model is, from headers and from a hub's listing."""

from pathlib import Path

import pytest
import torch
from hub_server import HubServer

from diffusers_qwenimage.loading import load_components
from diffusers_qwenimage.loading.sizes import describe_sizes, weight_sizes


def test_sizes_are_those_of_the_loaded_modules(model_folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parts = vars(load_components(model_folder, dtype=dtype))
        sizes = weight_sizes(model_folder, dtype)
        for name, size in sizes.items():
            assert size == sum(p.nbytes for p in {id(p): p for p in parts[name].parameters()}.values()), name


def test_a_hub_is_asked_for_its_listing_only(model_folder: Path, hub: HubServer) -> None:
    hub.add_folder("Qwen/Qwen-Image", model_folder)
    for source in ("Qwen/Qwen-Image", "modelscope:Qwen/Qwen-Image"):
        sizes = weight_sizes(source, torch.bfloat16)
        assert set(sizes) == {"transformer", "text_encoder", "vae"} and min(sizes.values()) > 0
    assert not hub.asked_for("transformer/diffusion_pytorch_model.safetensors")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a model in diffusers' layout"):
        weight_sizes(tmp_path, torch.bfloat16)
    with pytest.raises(ValueError, match="neither the id of a model"):
        weight_sizes("no/such/model", torch.bfloat16)


def test_sizes_for_reading() -> None:
    sizes = {"vae": 2**27, "transformer": 38 * 2**30}
    assert describe_sizes(sizes) == "38.1 GiB of weights (transformer 38.0, vae 0.1)"
