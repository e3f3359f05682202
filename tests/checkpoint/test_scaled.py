"""FP8 files: applied exactly, or refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from model_files import TRANSFORMER, tiny_transformer
from safetensors.torch import save_file
from torch import Tensor

from diffusers_qwenimage.checkpoint import from_tensors, load_transformer_file, open_checkpoint, read_weights

LAYER = "transformer_blocks.0.attn.to_q"
WEIGHT = torch.tensor([[1.5, -0.25, 3.0, 0.5], [-2.0, 448.0, 0.001953125, 7.0]])  # exact in e4m3


def fp8(name: str = "weight", dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    return {f"{LAYER}.{name}": WEIGHT.to(dtype)}


def marker() -> dict[str, Tensor]:
    return {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def quant(**settings: object) -> dict[str, Tensor]:
    return {f"{LAYER}.comfy_quant": torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)}


def read(tensors: dict[str, Tensor], dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    return read_weights(from_tensors(tensors), dtype=dtype)


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        (torch.tensor(0.125), torch.full((2, 4), 0.125)),
        (torch.tensor([3.0]), torch.full((2, 4), 3.0)),
        (torch.tensor([[2.0], [0.5]]), torch.tensor([[2.0] * 4, [0.5] * 4])),
        (
            torch.tensor([[[2.0], [3.0]], [[0.5], [1.0]]]),
            torch.tensor([[2.0, 2.0, 3.0, 3.0], [0.5, 0.5, 1.0, 1.0]]),
        ),
    ],
    ids=["number", "one", "rows", "blocks"],
)
def test_scales_are_applied_exactly(suffix: str, scale: Tensor, factors: Tensor) -> None:
    unused = {f"{LAYER}.scale_input": torch.ones(()), f"{LAYER}.input_scale": torch.ones(())}
    loaded = read({**fp8(), **marker(), **unused, f"{LAYER}.{suffix}": scale, f"{LAYER}.bias": torch.ones(2)})
    assert set(loaded) == {f"{LAYER}.weight", f"{LAYER}.bias"}
    assert torch.equal(loaded[f"{LAYER}.weight"], WEIGHT * factors)
    assert torch.equal(loaded[f"{LAYER}.bias"], torch.ones(2))


def test_the_product_is_rounded_once_to_the_wanted_type() -> None:
    scale = torch.tensor(1 / 3)
    loaded = read({**fp8(), f"{LAYER}.scale_weight": scale}, torch.bfloat16)
    assert torch.equal(loaded[f"{LAYER}.weight"], (WEIGHT * scale).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_upcast(dtype: torch.dtype) -> None:
    loaded = read(fp8(dtype=dtype), torch.bfloat16)
    assert torch.equal(loaded[f"{LAYER}.weight"], WEIGHT.to(dtype).to(torch.bfloat16))
    with pytest.raises(ValueError, match="fp8 weights.*dtype=torch.bfloat16"):
        read(fp8(dtype=dtype), None)


def test_comfyuis_record_of_a_known_format_is_accepted() -> None:
    tensors = {**fp8(), f"{LAYER}.weight_scale": torch.tensor(2.0)}
    known = quant(format="float8_e4m3fn", full_precision_matrix_mult=True)
    assert torch.equal(read({**tensors, **known})[f"{LAYER}.weight"], WEIGHT * 2)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({**fp8(), **marker()}, "no scale for"),
        (
            {**fp8(), "other.weight": WEIGHT.to(torch.float8_e4m3fn), "other.scale_weight": torch.ones(1)},
            "no scale",
        ),
        ({f"{LAYER}.scale_weight": torch.ones(1)}, "which is not there"),
        (
            {**fp8(), f"{LAYER}.scale_weight": torch.ones(1), f"{LAYER}.weight_scale": torch.ones(1)},
            "two scales",
        ),
        ({f"{LAYER}.weight": WEIGHT, f"{LAYER}.scale_weight": torch.ones(1)}, "F32 with a scale"),
        ({**fp8(), f"{LAYER}.scale_weight": torch.ones(2)}, r"scale of shape \(2,\)"),
        ({**fp8(), f"{LAYER}.scale_weight": torch.ones(1, 4)}, r"scale of shape \(1, 4\)"),
        ({**fp8(), f"{LAYER}.scale_weight": torch.ones(2, 3, 1)}, r"scale of shape \(2, 3, 1\)"),
        (
            {**fp8(), f"{LAYER}.weight_scale": torch.ones(2, 1, dtype=torch.uint8)},
            "scale of type U8",
        ),  # mxfp8
        ({**fp8(), f"{LAYER}.weight_scale_inv": torch.ones(1)}, "weight_scale_inv"),
        ({f"{LAYER}.weight": torch.ones(2, 2, dtype=torch.uint8)}, "the type U8"),  # nvfp4
        ({f"{LAYER}.weight": torch.ones(2, 2, dtype=torch.int8)}, "the type I8"),
        (
            {**fp8(), f"{LAYER}.weight_scale": torch.ones(1), **quant(format="int8_tensorwise")},
            "int8_tensorwise",
        ),
        (
            {**fp8(), f"{LAYER}.weight_scale": torch.ones(1), **quant(format="float8_e4m3fn", convrot=True)},
            "convrot",
        ),
        ({f"{LAYER}.qweight": torch.ones(2, 2)}, "qweight"),
    ],
)
def test_what_is_not_known_is_refused(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tensors)


@pytest.mark.parametrize(("record", "known"), [("float8_e4m3fn", True), ("nvfp4", False)])
def test_the_record_in_the_header_is_read(record: str, known: bool, tmp_path: Path) -> None:
    layers = {"layers": {LAYER: {"format": record}}}
    tensors = {**fp8(), f"{LAYER}.weight_scale": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"_quantization_metadata": json.dumps(layers)})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    if known:
        assert torch.equal(read_weights(checkpoint, dtype=torch.float32)[f"{LAYER}.weight"], WEIGHT * 2)
    else:
        with pytest.raises(ValueError, match="nvfp4"):
            read_weights(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("content", ["{", "[]", '{"layers": 1}'])
def test_a_broken_record_in_the_header_is_refused(content: str, tmp_path: Path) -> None:
    save_file(fp8(), tmp_path / "x.safetensors", metadata={"_quantization_metadata": content})
    with pytest.raises(ValueError, match="_quantization_metadata"):
        read_weights(open_checkpoint(tmp_path / "x.safetensors"), dtype=torch.float32)


def test_a_whole_scaled_file_as_comfyui_writes_it(tmp_path: Path) -> None:
    model = tiny_transformer()
    tensors, expected = marker(), {}
    for name, value in model.state_dict().items():
        expected[name] = value
        tensors[name] = value
        if value.ndim == 2 and ".attn." in name:
            scale = value.abs().max() / 448
            stored = (value / scale).to(torch.float8_e4m3fn)
            tensors[name], tensors[f"{name.removesuffix('.weight')}.scale_weight"] = stored, scale
            expected[name] = stored.float() * scale
    prefixed = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    save_file(prefixed, tmp_path / "fp8_scaled.safetensors")
    loaded = load_transformer_file(
        QwenImageTransformer2DModel,
        tmp_path / "fp8_scaled.safetensors",
        config=TRANSFORMER,
        dtype=torch.float32,
    )
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
