"""The bound is a bound: never below the true difference, and tight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.read import LoraFile, read_state_dict
from diffusers_qwenimage.lora.verify import compare_files, worst

M = "transformer_blocks.0.attn.to_q"
N = "transformer_blocks.1.attn.to_q"


def file_of(down: Tensor, up: Tensor, *, alpha: float | None = None, module: str = M) -> LoraFile:
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    return read_state_dict(tensors)


def random(seed: int, rank: int = 3, width: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-12, 1e-8, 1e-3, 1.0]))
def test_the_bound_holds_and_is_tight(seed: int, noise: float) -> None:
    down, up = random(seed)
    other = (
        up.double()
        + noise * torch.randn(up.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    )
    first, second = file_of(down.double(), up.double()), file_of(down.double(), other)
    comparison = compare_files(first, second)
    before, after = (delta_weight(file.updates[0]) for file in (first, second))
    true = float((before - after).norm() / before.norm())
    # Forming the changes rounds, too: 16 products of numbers around 1 in fp64.
    assert comparison.bound >= true - 1e-14
    assert comparison.bound <= true + 1e-12


def test_the_same_change_from_other_factors() -> None:
    """(B R) (R^-1 A) is the same change; that is not provable bit by bit, but the bound is that of fp64."""
    down, up = (tensor.double() for tensor in random(0))
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(5)).double() + 3 * torch.eye(3).double()
    comparison = compare_files(file_of(down, up), file_of(torch.linalg.solve(mix, down), up @ mix))
    assert not comparison.exact and comparison.bound < 1e-12


def test_equal_bits_other_alpha() -> None:
    down, up = random(1, rank=4)
    comparison = compare_files(file_of(down, up, alpha=4.0), file_of(down, up))
    assert comparison.exact and comparison.same_bits
    half = compare_files(file_of(down, up, alpha=2.0), file_of(down, up))
    assert not half.exact and half.bound == pytest.approx(1.0)  # the second is twice the first


def test_a_moved_scale_is_proved() -> None:
    down, up = random(2, rank=4)
    for moved in (file_of(down, up / 4), file_of(down / 4, up)):
        comparison = compare_files(file_of(down, up, alpha=1.0), moved)
        assert comparison.exact and not comparison.same_bits


def test_missing_modules_and_zero_changes() -> None:
    down, up = random(3)
    comparison = compare_files(file_of(down, up), file_of(down, up, module=N))
    assert comparison.bound == math.inf and len(worst(comparison, 5)) == 2
    assert "only the first file changes it" in comparison.summary()
    zero = torch.zeros_like(up)
    assert compare_files(file_of(down, zero), file_of(2 * down, zero)).bound == 0
    assert compare_files(file_of(down, zero), file_of(down, up)).bound == math.inf


def test_kinds_are_compared_by_what_they_do() -> None:
    down, up = (tensor.double() for tensor in random(4))
    difference = read_state_dict({f"{M}.diff": up @ down})
    comparison = compare_files(file_of(down, up), difference)
    assert not comparison.exact and comparison.bound < 1e-13
    biased = read_state_dict({f"{M}.diff": up @ down, f"{M}.diff_b": torch.ones(16)})
    assert compare_files(difference, biased).bound == math.inf


def test_a_dora_is_not_a_lora() -> None:
    down, up = random(5)
    plain = {f"{M}.lora_down.weight": down, f"{M}.lora_up.weight": up}
    first = read_state_dict({**plain, f"{M}.dora_scale": torch.ones(16, 1)})
    second = read_state_dict({**plain, f"{M}.dora_scale": torch.ones(16, 1) * 1.5})
    flat = read_state_dict({**plain, f"{M}.lora_magnitude_vector": torch.ones(16)})
    assert compare_files(first, read_state_dict(plain)).bound == math.inf
    assert compare_files(first, second).bound == pytest.approx(0.5)
    assert compare_files(first, flat).same_bits
