"""Whole models from folders and hubs, and single components from files."""

import json
import logging
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from hub_server import HubServer
from model_files import PUBLISHED_HEADS, tiny_tokenizer, tiny_transformer, tiny_vae
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_qwenimage.checkpoint import empty_module
from diffusers_qwenimage.loading import (
    Components,
    default_checkpoint,
    load_components,
    load_scheduler,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from diffusers_qwenimage.transformer import QwenImageTransformer2DModel
from diffusers_qwenimage.vae import AutoencoderKLQwenImage

MODULES = ("transformer", "vae", "text_encoder")


def assert_same_weights(ours: nn.Module, stock: nn.Module) -> None:
    expected, got = stock.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value.to(got[name].dtype)) for name, value in expected.items())


def settings_of(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def assert_same_as_stock(components: Components, folder: Path, dtype: torch.dtype) -> None:
    stock = QwenImagePipeline.from_pretrained(folder, dtype=dtype)
    for name in MODULES:
        assert_same_weights(getattr(components, name), getattr(stock, name))
        assert getattr(components, name).dtype == dtype
        assert not getattr(components, name).training
    assert settings_of(components.scheduler) == settings_of(stock.scheduler)
    assert components.tokenizer.get_vocab() == stock.tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_diffusers_from_a_folder(model_folder: Path, dtype: torch.dtype) -> None:
    components = load_components(model_folder, dtype=dtype)
    assert isinstance(components.transformer, QwenImageTransformer2DModel)
    assert isinstance(components.vae, AutoencoderKLQwenImage)
    assert_same_as_stock(components, model_folder, dtype)


@pytest.mark.parametrize("source", ["Qwen/Qwen-Image", "modelscope:Qwen/Qwen-Image"])
def test_both_hubs_give_the_same_components(source: str, model_folder: Path, hub: HubServer) -> None:
    hub.add_folder("Qwen/Qwen-Image", model_folder)
    hub.repositories["Qwen/Qwen-Image"]["assets/big.bin"] = b"not needed"
    assert_same_as_stock(load_components(source, dtype=torch.float32), model_folder, torch.float32)
    assert not hub.asked_for("assets/big.bin")
    hub.stop()
    load_components(source, dtype=torch.float32, local_only=True)


def test_the_text_encoder_computes_what_stock_computes(model_folder: Path) -> None:
    """Also its buffers, which are in no file, are right after a start on the meta device."""
    ours = load_text_encoder(model_folder / "text_encoder", dtype=torch.float32)
    stock = QwenImagePipeline.from_pretrained(model_folder).text_encoder
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert {**ours.config.to_dict(), "_name_or_path": ""} == {**stock.config.to_dict(), "_name_or_path": ""}


@pytest.mark.parametrize("layout", ["model.visual.", "visual."])
def test_both_key_layouts_of_the_text_encoder_load(layout: str, model_folder: Path, tmp_path: Path) -> None:
    saved = load_file(model_folder / "text_encoder" / "model.safetensors")
    assert any(name.startswith("visual.") for name in saved), "what transformers 5 writes is the old layout"
    if layout == "model.visual.":
        saved = {
            name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): value
            for name, value in saved.items()
        }
    shutil.copy(model_folder / "text_encoder" / "config.json", tmp_path)
    save_file(saved, tmp_path / "model.safetensors")
    ours = load_text_encoder(tmp_path / "model.safetensors", dtype=torch.float32)
    assert_same_weights(ours, load_text_encoder(model_folder / "text_encoder", dtype=torch.float32))


def test_a_text_encoder_with_tied_embeddings_needs_no_head_in_the_file(
    tmp_path: Path, model_folder: Path
) -> None:
    config = json.loads((model_folder / "text_encoder" / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    tensors = load_file(model_folder / "text_encoder" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    tied = load_text_encoder(tmp_path / "model.safetensors", config=config, dtype=torch.bfloat16)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    untied = json.loads((model_folder / "text_encoder" / "config.json").read_text())
    with pytest.raises(ValueError, match="1 missing .'lm_head.weight'"):
        load_text_encoder(tmp_path / "model.safetensors", config=untied)


def test_what_was_loaded_can_be_saved_and_loaded_by_stock(model_folder: Path, tmp_path: Path) -> None:
    components = load_components(model_folder, dtype=torch.bfloat16)
    pipeline = QwenImagePipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    for name in MODULES:
        getattr(components, name).save_pretrained(tmp_path / name)
        assert_same_weights(
            type(getattr(pipeline, name)).from_pretrained(tmp_path / name, dtype=torch.bfloat16),
            getattr(pipeline, name),
        )


def test_shards_with_and_without_an_index_and_a_single_file_give_the_same(tmp_path: Path) -> None:
    model = tiny_transformer(**PUBLISHED_HEADS)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="400KB")
    model.save_pretrained(tmp_path / "single")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert_same_weights(load_transformer(tmp_path / "sharded"), model)
    (tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (tmp_path / "sharded" / "config.json").unlink()
    assert_same_weights(load_transformer(shards), model)
    assert_same_weights(load_transformer(tmp_path / "sharded"), model)
    (tmp_path / "single" / "config.json").unlink()
    assert_same_weights(load_transformer(tmp_path / "single" / "diffusion_pytorch_model.safetensors"), model)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-"):
        load_transformer(tmp_path / "sharded")


def test_the_transformer_may_come_from_another_file(model_folder: Path, tmp_path: Path) -> None:
    other = tiny_transformer(**PUBLISHED_HEADS)
    file = tmp_path / "comfy.safetensors"
    save_file({f"model.diffusion_model.{k}": v for k, v in other.state_dict().items()}, file)
    shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("transformer"))
    components = load_components(tmp_path / "model", transformer=file, dtype=torch.float32)
    assert_same_weights(components.transformer, other)


def test_4_channel_vae(tmp_path: Path) -> None:
    tiny_vae(input_channels=4).save_pretrained(tmp_path / "rgba")
    assert load_vae(tmp_path / "rgba").config.input_channels == 4


def test_the_published_scheduler_is_the_one_in_the_folder(model_folder: Path) -> None:
    assert settings_of(load_scheduler()) == settings_of(load_scheduler(model_folder / "scheduler"))
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
        load_scheduler(model_folder / "vae")


def test_folders_that_are_no_model_are_named(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a model in diffusers' layout"):
        load_components(tmp_path)
    with pytest.raises(ValueError, match="neither the id of a model"):
        load_components(tmp_path / "none")
    with pytest.raises(ValueError, match="single file, not a whole model"):
        load_components(tmp_path / "x.safetensors")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    with pytest.raises(ValueError, match="describes another model"):
        load_components(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        load_components(tmp_path)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(50)])
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, but the text encoder only \d+"):
        load_components(tmp_path / "model")


def test_a_damaged_component_is_named(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"vae.*is truncated"):
        load_components(tmp_path / "model")


def test_the_config_told_by_shapes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(tiny_transformer(**PUBLISHED_HEADS).state_dict(), tmp_path / "x.safetensors")
    with caplog.at_level(logging.INFO, logger="diffusers_qwenimage"):
        load_transformer(tmp_path / "x.safetensors")
    assert "its shapes say" in caplog.text and "'num_layers': 2" in caplog.text


def test_the_embedded_model_is_found() -> None:
    assert (default_checkpoint() / "model_index.json").is_file()


MEASURE = """
import sys, threading, time, torch
from diffusers_qwenimage.loading import load_transformer

def used():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def peak(dtype):
    start, peak, done = used(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, used() - start)
    thread = threading.Thread(target=watch)
    thread.start()
    load_transformer(sys.argv[1], dtype=dtype)
    done.set()
    thread.join()
    return peak

print(peak(torch.float32), peak(torch.bfloat16))
"""


def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    """The peak of memory that is not backed by files, in a process of its own."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("reads Linux's /proc")
    tiny_transformer(num_layers=3, **{**PUBLISHED_HEADS, "num_attention_heads": 6}).save_pretrained(tmp_path)
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    float32, bfloat16 = (int(value) / size for value in output.split())
    assert float32 < 0.2, "nothing is copied"
    assert bfloat16 < 0.8, "half of the file's size, and one tensor"


@pytest.mark.slow
def test_a_file_larger_than_the_memory_loads(tmp_path: Path) -> None:
    """The true transformer, 40.9 GB as one ComfyUI file; sparse, so that it takes no room on the disk."""
    entries: dict[str, Any] = {}
    end = 0
    for name, value in empty_module(QwenImageTransformer2DModel).state_dict().items():
        start, end = end, end + 2 * value.numel()
        entry = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
        entries[f"model.diffusion_model.{name}"] = entry
    header = json.dumps(entries).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    model = load_transformer(tmp_path / "big.safetensors", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_430_401_088
    assert model.transformer_blocks[59].img_mod[1].weight.sum() == 0
