"""Merging LoRAs: the sum of the changes, exactly or within the rounding of fp32, checked on full matrices."""

import json
from pathlib import Path

import pytest
import torch
from lora_made import MODULES, factors, lora_tensors, write_lora
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.merge import MERGE_KEY, merge_loras
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.targets import TARGETS


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {update.module: delta_weight(update) for update in read_lora(path).updates}


def test_equal_strengths_copy_the_factors(tmp_path: Path) -> None:
    first = write_lora(tmp_path / "a.safetensors", rank=4, alpha=2.0, dtype=torch.bfloat16)
    second = write_lora(tmp_path / "b.safetensors", rank=8, alpha=4.0, seed=1, dtype=torch.bfloat16)
    result = merge_loras([(first, 1.0), (second, 1.0)], tmp_path / "out.safetensors")
    assert result.comparison.exact
    written = load_file(tmp_path / "out.safetensors")
    module = "transformer_blocks.0.attn.to_q"
    assert float(written[f"{module}.alpha"]) == 6.0  # the scale 1/2 times the rank 12
    up = torch.cat([factors(module, r, seed=s, dtype=torch.bfloat16)[0] for r, s in ((4, 0), (8, 1))], 1)
    assert torch.equal(written[f"{module}.lora_up.weight"], up)


@pytest.mark.parametrize(("weights", "exact"), [((0.5, 2.0), True), ((1.0, -1.0), True), ((0.7, 0.3), False)])
def test_weights(weights: tuple[float, float], exact: bool, tmp_path: Path) -> None:
    first = write_lora(tmp_path / "a.safetensors", "kohya", rank=4, alpha=1.0, dtype=torch.bfloat16)
    second = write_lora(tmp_path / "b.safetensors", "diffsynth", rank=2, alpha=None, seed=1)
    result = merge_loras(
        list(zip((first, second), weights, strict=True)), tmp_path / "out.safetensors", "diffusers"
    )
    assert result.comparison.exact is exact
    assert result.comparison.bound < 2e-7  # half a unit of fp32 in one factor, with room for its rounding
    ours, one, two = deltas(tmp_path / "out.safetensors"), deltas(first), deltas(second)
    for module in MODULES:
        expected = weights[0] * one[module] + weights[1] * two[module]
        assert (ours[module] - expected).norm() <= 2e-7 * expected.norm()


def test_modules_of_one_file_only_and_zero_weights(tmp_path: Path) -> None:
    first = write_lora(tmp_path / "a.safetensors", modules=MODULES[:2])
    second = write_lora(tmp_path / "b.safetensors", modules=MODULES[2:4], seed=1)
    third = write_lora(tmp_path / "c.safetensors", modules=MODULES[4:5], seed=2)
    merge_loras([(first, 1.0), (second, 1.0), (third, 0.0)], tmp_path / "out.safetensors")
    assert set(deltas(tmp_path / "out.safetensors")) == set(MODULES[:4])
    with pytest.raises(ValueError, match="Nothing is left"):
        merge_loras([(third, 0.0)], tmp_path / "none.safetensors")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str, tmp_path: Path) -> None:
    sources = [
        (write_lora(tmp_path / f"{seed}.safetensors", rank=2, seed=seed, alpha=1.0), weight)
        for seed, weight in ((0, 1.0), (1, 0.5), (2, -0.25))
    ]
    output = tmp_path / ("out" if target == "peft" else "out.safetensors")
    assert merge_loras(sources, output, target).comparison.exact


def test_lokr_joins_a_lora(tmp_path: Path) -> None:
    module = MODULES[0]
    lokr = {
        f"lycoris_{module.replace('.', '_')}.lokr_w1": torch.randn(4, 4),
        f"lycoris_{module.replace('.', '_')}.lokr_w2_a": torch.randn(12, 2),
        f"lycoris_{module.replace('.', '_')}.lokr_w2_b": torch.randn(2, 12),
        f"lycoris_{module.replace('.', '_')}.alpha": torch.tensor(1.0),
    }
    save_file({key: tensor.bfloat16() for key, tensor in lokr.items()}, tmp_path / "lokr.safetensors")
    lora = write_lora(tmp_path / "lora.safetensors", modules=(module,))
    merge_loras([(tmp_path / "lokr.safetensors", 1.0), (lora, 1.0)], tmp_path / "out.safetensors")
    expected = deltas(tmp_path / "lokr.safetensors")[module] + deltas(lora)[module]
    ours = deltas(tmp_path / "out.safetensors")[module]
    assert (ours - expected).norm() <= 2e-7 * expected.norm()


def test_full_differences_add_up(tmp_path: Path) -> None:
    module = MODULES[0]
    for name in ("a", "b"):
        tensors = {
            f"diffusion_model.{module}.diff": torch.randn(48, 48),
            f"diffusion_model.{module}.diff_b": torch.randn(48),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    pairs = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", 1.0)]
    assert merge_loras(pairs, tmp_path / "out.safetensors", "comfyui").comparison.bound < 2e-7
    one, two = load_file(pairs[0][0]), load_file(pairs[1][0])
    for key, value in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(value, 0.5 * one[key] + two[key])


def test_what_does_not_add_up_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors("diffusers", alpha=None, modules=MODULES[:1])
    save_file(tensors, tmp_path / "lora.safetensors")
    save_file(
        {**tensors, f"transformer.{MODULES[0]}.lora_magnitude_vector": torch.ones(48)},
        tmp_path / "dora.safetensors",
    )
    save_file({f"diffusion_model.{MODULES[0]}.diff": torch.ones(48, 48)}, tmp_path / "diff.safetensors")
    output = tmp_path / "out.safetensors"
    for name, reason in (("dora", "DoRA magnitude"), ("diff", "no common low-rank form")):
        with pytest.raises(ValueError, match=reason):
            merge_loras(
                [(tmp_path / f"{name}.safetensors", 1.0), (tmp_path / "lora.safetensors", 1.0)], output
            )
    with pytest.raises(ValueError, match="one of the inputs"):
        merge_loras([(output, 1.0)], output)
    with pytest.raises(ValueError, match="finite"):
        merge_loras([(tmp_path / "lora.safetensors", float("nan"))], output)
    narrow = write_lora(tmp_path / "narrow.safetensors", modules=MODULES[:1], hidden=32)
    with pytest.raises(ValueError, match="different shapes"):
        merge_loras([(narrow, 1.0), (tmp_path / "lora.safetensors", 1.0)], output)
    assert not output.exists()


def test_metadata_names_the_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        metadata = {"ss_base_model_version": "qwen_image", "ss_output_name": name, "sshs_model_hash": "12"}
        save_file(lora_tensors(modules=MODULES[:1]), tmp_path / f"{name}.safetensors", metadata=metadata)
    pairs = [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 0.5)]
    merge_loras(pairs, tmp_path / "out.safetensors")
    metadata = dict(read_lora(tmp_path / "out.safetensors").metadata)
    assert json.loads(metadata.pop(MERGE_KEY)) == [
        {"name": "a.safetensors", "weight": 1.0},
        {"name": "b.safetensors", "weight": 0.5},
    ]
    assert metadata == {"format": "pt", "ss_base_model_version": "qwen_image"}
