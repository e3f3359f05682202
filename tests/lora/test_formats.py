"""Keys of every writer: read, and spelled again as they were; the tables against the real model."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from lora_samples import samples

from diffusers_qwenimage.lora.architectures import (
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    QWEN_IMAGE_LAYERED,
    infer_dimensions,
)
from diffusers_qwenimage.lora.formats import FORMATS, parse_key
from diffusers_qwenimage.lora.read import parse_tensors
from diffusers_qwenimage.lora.updates import stored


@pytest.fixture(scope="module")
def published_model() -> QwenImageTransformer2DModel:
    with init_empty_weights():
        return QwenImageTransformer2DModel()


def test_the_table_is_that_of_the_published_model(published_model: QwenImageTransformer2DModel) -> None:
    linears = {n: m for n, m in published_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert sorted(linears) == sorted(QWEN_IMAGE.linears())
    assert len(linears) == 846
    shapes = [(name, tuple(linear.weight.shape)) for name, linear in linears.items()]
    dimensions, problems = infer_dimensions(QWEN_IMAGE, shapes)
    assert problems == []
    published = {name: size for name, size in QWEN_IMAGE.published.items() if name != "head"}
    assert dimensions == published


def test_norms_are_those_of_the_published_model(published_model: QwenImageTransformer2DModel) -> None:
    norms = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in published_model.named_parameters()
        if "norm" in name and parameter.ndim == 1 and name.endswith(".weight")
    }
    assert len(norms) == 60 * 4 + 1
    dimensions, problems = infer_dimensions(QWEN_IMAGE, norms.items())
    assert problems == []
    assert (dimensions["head"], dimensions["text"]) == (128, 3584)


def test_flattened_names_are_unique() -> None:
    names = [*QWEN_IMAGE.block_modules, *QWEN_IMAGE_LAYERED.top_modules]
    flat = {name.replace(".", "_") for name in names}
    assert len(flat) == len(names)
    for name in QWEN_IMAGE.linears(2):
        assert QWEN_IMAGE.unflatten(name.replace(".", "_")) == name


def test_names_and_prefixes_of_formats_are_distinct() -> None:
    assert len({format_.name for format_ in FORMATS}) == len(FORMATS)
    assert len({(format_.prefix, format_.spelling.name) for format_ in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("name", samples())
def test_every_key_of_every_writer_is_read_and_spelled_again(name: str) -> None:
    unspelled = []
    for key in samples()[name].keys:
        found = parse_key(key)
        assert found is not None, key
        format_, parsed = found
        if format_.render(parsed.module, parsed.role, parsed.adapter or "default") != key:
            unspelled.append(key)
    # Roles that have several suffixes are spelled in one way only.
    assert all(
        key.endswith(("magnitude_vector.weight", ".dora_scale", ".magnitude", "_norm")) for key in unspelled
    )


@pytest.mark.parametrize("name", samples())
def test_every_sample_is_read_completely(name: str) -> None:
    tensors = samples()[name].tensors()
    file = parse_tensors({key: stored(key, tensor) for key, tensor in tensors.items()}, name=name)
    assert file.problems == ()
    used = [tensor.key for update in file.updates for tensor in update.tensors.values()]
    assert sorted(used) == sorted(tensors)
    assert sum(file.formats.values()) == len(tensors)
    if name.startswith("qwen_image_21"):
        assert file.architecture is QWEN_IMAGE_21


@pytest.mark.parametrize(
    "key",
    [
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.to_q.lora_A",
        "transformer_blocks.00.attn.to_q.lora_A.weight",
        "transformer_blocks.-1.attn.to_q.lora_A.weight",
        "transformer_blocks.0.attn.to_x.lora_A.weight",
        "lora_unet_single_blocks_0_linear1.lora_down.weight",
        "../../transformer_blocks.0.attn.to_q.lora_A.weight",
        "unet.down_blocks.0.lora_A.weight",
        "",
        "alpha",
        ".alpha",
    ],
)
def test_other_keys_are_not_read(key: str) -> None:
    assert parse_key(key) is None
