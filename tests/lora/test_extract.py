"""Extracting: the LoRA that was added to a checkpoint comes back; nothing is clamped; errors are stated."""

from pathlib import Path

import pytest
import torch
from components import transformers
from lora_made import MODULES, factors
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_qwenimage.lora.extract import extract_lora
from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.resize import RankRule


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    state = {key: tensor.clone() for key, tensor in transformers()[1].state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    return state


def write_tuned(folder: Path, base: dict[str, Tensor], **changes: Tensor) -> Path:
    tuned = {**base, **{key: base[key] + change for key, change in changes.items()}}
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "tuned.safetensors"


def low_rank_changes(rank: int) -> dict[str, Tensor]:
    pairs = {module: factors(module, rank) for module in MODULES}
    return {f"{module}.weight": up @ down for module, (up, down) in pairs.items()}


def test_an_added_lora_comes_back(base: dict[str, Tensor], tmp_path: Path) -> None:
    changes = low_rank_changes(3)
    tuned = write_tuned(tmp_path, base, **changes)
    result = extract_lora(
        tmp_path / "base.safetensors",
        tuned,
        tmp_path / "out.safetensors",
        RankRule(rank=3),
        dtype=torch.float32,
    )
    assert {error.module for error in result.modules} == set(MODULES)
    assert result.num_unchanged == len(base) - len(MODULES)
    updates = {update.module: update for update in read_lora(tmp_path / "out.safetensors").updates}
    for module in MODULES:
        wanted = (load_file(tuned)[f"{module}.weight"] - base[f"{module}.weight"]).double()
        # base + change is rounded to fp32, and that rounding noise is not of rank 3.
        assert (delta_weight(updates[module]) - wanted).norm() < 2e-6 * wanted.norm()


def test_large_entries_are_not_clamped(base: dict[str, Tensor], tmp_path: Path) -> None:
    change = torch.zeros(48, 48)
    change[3, 5] = 7.0
    tuned = write_tuned(tmp_path, base, **{f"{MODULES[0]}.weight": change})
    extract_lora(tmp_path / "base.safetensors", tuned, tmp_path / "out.safetensors", RankRule(rank=1))
    (update,) = read_lora(tmp_path / "out.safetensors").updates
    assert float(delta_weight(update)[3, 5]) == pytest.approx(7.0, rel=8e-3)  # two roundings to bf16


def test_the_stated_error_is_the_real_one(base: dict[str, Tensor], tmp_path: Path) -> None:
    change = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    tuned = write_tuned(tmp_path, base, **{f"{MODULES[0]}.weight": change})
    result = extract_lora(
        tmp_path / "base.safetensors", tuned, tmp_path / "out.safetensors", RankRule(energy=0.8)
    )
    (error,) = result.modules
    wanted = (load_file(tuned)[f"{MODULES[0]}.weight"] - base[f"{MODULES[0]}.weight"]).double()
    (update,) = read_lora(tmp_path / "out.safetensors").updates
    actual = float((delta_weight(update) - wanted).norm() / wanted.norm())
    assert error.relative_error == pytest.approx(actual, rel=1e-3)
    assert actual**2 < 0.2 + 1e-3
    values = torch.linalg.svdvals(wanted).square().cumsum(0)
    assert error.new_rank == 1 + int((values < 0.8 * values[-1]).sum())


def test_biases_and_norms(base: dict[str, Tensor], tmp_path: Path) -> None:
    norm, bias = "transformer_blocks.0.attn.norm_q.weight", f"{MODULES[0]}.bias"
    changes = {**low_rank_changes(2), norm: torch.ones(16), bias: torch.ones(48)}
    tuned = write_tuned(tmp_path, base, **changes)
    paths = (tmp_path / "base.safetensors", tuned, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="2 parameters changed that a LoRA of this target cannot hold"):
        extract_lora(*paths, RankRule(rank=2))
    assert not paths[2].exists()
    assert set(extract_lora(*paths, RankRule(rank=2), drop_others=True).left_out) == {norm, bias}
    assert extract_lora(*paths, RankRule(rank=2), to="comfyui").left_out == ()
    kinds = {(update.module, update.kind) for update in read_lora(paths[2]).updates}
    assert (norm.removesuffix(".weight"), "diff") in kinds and (MODULES[0], "diff_b") in kinds


def test_refusals(base: dict[str, Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="does not differ"):
        extract_lora(source, source, output, RankRule(rank=2))
    save_file({k: v for k, v in base.items() if k != "proj_out.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"1 are in one only, such as proj_out\.bias"):
        extract_lora(source, tmp_path / "less.safetensors", output, RankRule(rank=2))
    damaged = write_tuned(tmp_path, base, **{f"{MODULES[0]}.weight": torch.full((48, 48), float("nan"))})
    with pytest.raises(ValueError, match="NaN"):
        extract_lora(source, damaged, output, RankRule(rank=2))


def test_comfyui_fp8_against_shards(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Checkpoints in different layouts are compared by parameter; fp8 weights by their scales."""
    shard = tmp_path / "folder"
    shard.mkdir()
    names = sorted(base)
    for number, part in ((1, names[:20]), (2, names[20:])):
        save_file(
            {name: base[name] for name in part},
            shard / f"diffusion_pytorch_model-{number:05}-of-00002.safetensors",
        )
    scaled: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in base.items():
        key = f"model.diffusion_model.{name}"
        scaled[key] = tensor
        if name == f"{MODULES[0]}.weight":
            scale = tensor.abs().max() / 448
            scaled[key] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[f"model.diffusion_model.{MODULES[0]}.scale_weight"] = scale
    save_file(scaled, tmp_path / "comfy.safetensors")
    result = extract_lora(
        shard,
        tmp_path / "comfy.safetensors",
        tmp_path / "out.safetensors",
        RankRule(rank=48),
        dtype=torch.float32,
    )
    (error,) = result.modules
    assert error.module == MODULES[0] and error.relative_error < 1e-5  # the full rank, in fp32
