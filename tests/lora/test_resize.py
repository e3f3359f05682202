"""Resizing: the best approximation of a rank (Eckart and Young), and the error that is stated for it."""

from pathlib import Path

import pytest
import torch
from lora_made import MODULES, lora_tensors, write_lora
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.resize import RankRule, resize_lora


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {update.module: delta_weight(update) for update in read_lora(path).updates}


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_best_approximation_and_its_error(rank: int, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", "kohya", rank=12, alpha=5.0)
    result = resize_lora(source, tmp_path / "b.safetensors", RankRule(rank=rank))
    before, after = deltas(source), deltas(tmp_path / "b.safetensors")
    total_error = total = 0.0
    for module in result.modules:
        wanted, got = before[module.module], after[module.module]
        values = torch.linalg.svdvals(wanted)
        best = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
        actual = float((wanted - got).norm() / wanted.norm())
        # Stored in fp32: half a unit in each factor is 1e-7 of the change.
        assert actual == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert module.relative_error == pytest.approx(actual, rel=1e-5, abs=1e-6)
        assert module.old_rank == 12 and module.new_rank == rank
        total_error += float((wanted - got).square().sum())
        total += float(wanted.square().sum())
    assert result.relative_error == pytest.approx((total_error / total) ** 0.5, rel=1e-5)
    assert {update.rank for update in read_lora(tmp_path / "b.safetensors").updates} == {rank}


def test_a_rank_that_is_not_needed_costs_nothing(tmp_path: Path) -> None:
    """Two copies side by side have twice the rank of what they hold."""
    tensors = {}
    for key, tensor in lora_tensors(rank=3, alpha=None).items():
        tensors[key] = torch.cat([tensor, tensor], dim=1 if "up" in key else 0)
    save_file(tensors, tmp_path / "a.safetensors")
    result = resize_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RankRule(energy=1.0))
    assert {module.new_rank for module in result.modules} == {3}
    assert result.relative_error < 1e-6  # the rounding of fp32


def test_not_centred(tmp_path: Path) -> None:
    """A change whose columns have a large mean keeps it (a centring decomposition loses 75 % here)."""
    up, down = torch.ones(48, 4) + 0.1 * torch.randn(48, 4), torch.ones(4, 48) + 0.1 * torch.randn(4, 48)
    module = MODULES[0]
    save_file(
        {
            f"{module}.lora_up.weight": up,
            f"{module}.lora_down.weight": down,
            f"{module}.alpha": torch.ones([]),
        },
        tmp_path / "a.safetensors",
    )
    result = resize_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RankRule(rank=1))
    assert result.relative_error < 0.05


def test_small_ranks_are_copied_bit_by_bit(tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", rank=4, dtype=torch.bfloat16)
    result = resize_lora(source, tmp_path / "b.safetensors", RankRule(rank=16))
    assert result.conversion.comparison.same_bits and result.relative_error == 0
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_rounding_is_part_of_the_error(tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", rank=8, dtype=torch.bfloat16)
    resize_lora(source, tmp_path / "b.safetensors", RankRule(rank=7))
    exact = resize_lora(source, tmp_path / "c.safetensors", RankRule(rank=7), dtype=torch.float32)
    rounded = resize_lora(source, tmp_path / "d.safetensors", RankRule(rank=7), dtype=torch.bfloat16)
    assert load_file(tmp_path / "b.safetensors")[f"{MODULES[0]}.lora_up.weight"].dtype == torch.bfloat16
    before, after = deltas(source), deltas(tmp_path / "d.safetensors")
    for fine, coarse in zip(exact.modules, rounded.modules, strict=True):
        actual = float((before[coarse.module] - after[coarse.module]).square().sum())
        # Cut and rounding are orthogonal but for terms of the size of their product.
        assert coarse.squared_error == pytest.approx(actual, rel=0.02)
        assert coarse.squared_error > fine.squared_error


def test_rules() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.1])
    total = float(values.square().sum())
    assert RankRule(rank=3).choose(values, total) == 3
    assert RankRule(rank=9).choose(values, total) == 4
    assert RankRule(threshold=0.25).choose(values, total) == 3
    assert RankRule(threshold=0.26).choose(values, total) == 2
    assert RankRule(energy=16 / total).choose(values, total) == 1
    assert RankRule(energy=0.9).choose(values, total) == 2
    assert RankRule(energy=1.0).choose(values, total) == 4
    assert RankRule(rank=1, energy=1.0).choose(values, total) == 1
    for bad in ({}, {"rank": 0}, {"energy": 0.0}, {"threshold": 1.5}):
        with pytest.raises(ValueError):
            RankRule(**bad)  # type: ignore[arg-type]


def test_lokr_and_differences_become_factors(tmp_path: Path) -> None:
    module = MODULES[0]
    tensors = {
        f"diffusion_model.{module}.lokr_w1": torch.randn(4, 4),
        f"diffusion_model.{module}.lokr_w2": torch.randn(12, 12),
        f"diffusion_model.{MODULES[1]}.diff": torch.randn(48, 48),
        f"diffusion_model.{MODULES[1]}.diff_b": torch.randn(48),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    result = resize_lora(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", RankRule(rank=20), to="comfyui"
    )
    before = {
        u.module: delta_weight(u) for u in read_lora(tmp_path / "a.safetensors").updates if u.kind != "diff_b"
    }
    after = {
        u.module: delta_weight(u) for u in read_lora(tmp_path / "b.safetensors").updates if u.kind != "diff_b"
    }
    for error in result.modules:
        wanted = before[error.module]
        values = torch.linalg.svdvals(wanted)
        assert error.new_rank == 20
        assert error.relative_error == pytest.approx(float(values[20:].norm() / values.norm()), rel=1e-4)
        assert float((wanted - after[error.module]).norm() / wanted.norm()) == pytest.approx(
            error.relative_error, rel=1e-4
        )
    kept = load_file(tmp_path / "b.safetensors")[f"diffusion_model.{MODULES[1]}.diff_b"]
    assert torch.equal(kept, tensors[f"diffusion_model.{MODULES[1]}.diff_b"])


def test_dora_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors("diffusers", alpha=None, modules=MODULES[:1])
    tensors[f"transformer.{MODULES[0]}.lora_magnitude_vector"] = torch.ones(48)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="DoRA"):
        resize_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RankRule(rank=2))
    assert not (tmp_path / "b.safetensors").exists()
