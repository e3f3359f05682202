"""Exact arithmetic on factors: what is called exact is, for every type and number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_qwenimage.lora.factors import (
    delta_weight,
    exact_power_product,
    expand,
    expanded_rank,
    fold_scale,
    update_factors,
)
from diffusers_qwenimage.lora.read import read_state_dict
from diffusers_qwenimage.lora.updates import LoraUpdate, all_finite, equal_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
M = "transformer_blocks.0.attn.to_q"


def single(tensors: dict[str, Tensor]) -> LoraUpdate:
    (update,) = read_state_dict({f"{M}.{name}": tensor for name, tensor in tensors.items()}).updates
    return update


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=6),
    st.integers(-30, 30),
    st.sampled_from([1, -1]),
)
def test_a_power_of_two_is_multiplied_exactly_or_not_at_all(
    dtype: torch.dtype, values: list[float], power: int, sign: int
) -> None:
    factor = torch.tensor(values, dtype=torch.float64).to(dtype)
    if not torch.isfinite(factor).all():
        return
    product = exact_power_product(factor, sign * 2.0**power)
    if product is not None:
        assert product.dtype == dtype and torch.isfinite(product).all()
        assert torch.equal(product.double(), factor.double() * sign * 2.0**power)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_numbers_take_the_quick_way(dtype: torch.dtype) -> None:
    factor = torch.tensor([0.0, 1.5, -3.0, 1e-3], dtype=dtype)
    product = exact_power_product(factor, 0.25)
    assert product is not None and torch.equal(product, factor * 0.25)
    assert exact_power_product(factor, 0.3) is None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_and_infinity_are_found_in_every_type(dtype: torch.dtype) -> None:
    good = torch.tensor([0.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert all_finite(good) and all_finite(good[:0])
    assert not all_finite(torch.tensor([0.0, math.nan, 1.0]).to(dtype))
    if dtype != torch.float8_e4m3fn:  # it has no infinity
        assert not all_finite(torch.tensor([0.0, -math.inf]).to(dtype))


def test_equal_bits_tells_minus_zero_and_types_apart() -> None:
    zero = torch.zeros(2)
    assert equal_bits(zero, zero.clone())
    assert not equal_bits(zero, -zero)
    assert not equal_bits(zero, zero.to(torch.float64)[:1])
    assert not equal_bits(torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "alpha", "role", "upcast"),
    [
        (torch.bfloat16, 1.0, "up", False),  # 1/4
        (torch.bfloat16, 3.0, "up", True),  # 3/4 has two bits: exact in fp32
        (torch.float32, 1.0, "up", False),
        (torch.float8_e4m3fn, 2.0, "up", False),
    ],
)
def test_folding(dtype: torch.dtype, alpha: float, role: str, upcast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 8, generator=generator), torch.randn(8, 4, generator=generator) + 4
    update = single(
        {"lora_down.weight": down.to(dtype), "lora_up.weight": up.to(dtype), "alpha": torch.tensor(alpha)}
    )
    folded = fold_scale(update, allow_rounding=False)
    assert folded is not None and folded.exact and (folded.role, folded.upcast) == (role, upcast)
    product = folded.tensors["up"].load().double() @ folded.tensors["down"].load().double()
    assert torch.equal(product, delta_weight(update))


def test_folding_goes_to_the_other_factor_where_one_would_underflow() -> None:
    """Small fp16 numbers become subnormal and lose bits; the down factor is large enough."""
    update = single(
        {
            "lora_down.weight": torch.full((4, 8), 0.7, dtype=torch.float16),
            "lora_up.weight": torch.full((8, 4), 1.0009765625 * 2**-14, dtype=torch.float16),
            "alpha": torch.tensor(1.0),
        }
    )
    folded = fold_scale(update, allow_rounding=False)
    assert folded is not None and folded.role == "down" and not folded.upcast


def test_a_third_is_refused_or_rounded() -> None:
    update = single(
        {
            "lora_down.weight": torch.ones(3, 8),
            "lora_up.weight": torch.full((8, 3), 1.7),
            "alpha": torch.tensor(1.0),
        }
    )
    assert fold_scale(update, allow_rounding=False) is None
    folded = fold_scale(update, allow_rounding=True)
    assert folded is not None and not folded.exact


def reference_lokr(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.kron(w1.double(), w2.double())


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lokr_expands_exactly(first: str, second: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    w1a, w1b = (torch.randn(s, generator=generator).to(dtype) for s in ((4, 2), (2, 2)))
    w2a, w2b = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 1), (1, 4)))
    whole2 = torch.randn(2, 4, generator=generator).to(dtype)
    tensors = {}
    tensors |= {"lokr_w1": w1a} if first == "whole" else {"lokr_w1_a": w1a, "lokr_w1_b": w1b}
    tensors |= {"lokr_w2": whole2} if second == "whole" else {"lokr_w2_a": w2a, "lokr_w2_b": w2b}
    update = single({**tensors, "alpha": torch.tensor(3.0)})
    w1 = w1a.double() if first == "whole" else w1a.double() @ w1b.double()
    w2 = whole2.double() if second == "whole" else w2a.double() @ w2b.double()
    # The rank is that of the second factor, of the first where the second is whole; both whole: no scale.
    scale = 1 if first == second == "whole" else 3 / (1 if second == "factors" else 2)
    expected = reference_lokr(w1, w2) * scale
    up, down = update_factors(update)
    torch.testing.assert_close(up @ down, expected, rtol=1e-13, atol=0)
    expanded = expand(update)
    assert expanded.exact and expanded.rank == expanded_rank(update) == down.shape[0]
    product = expanded.tensors["up"].load().double() @ expanded.tensors["down"].load().double()
    torch.testing.assert_close(product * scale, expected, rtol=1e-13, atol=0)


def test_loha_expands_exactly() -> None:
    generator = torch.Generator().manual_seed(2)
    w1a, w1b, w2a, w2b = (
        torch.randn(s, generator=generator).to(torch.bfloat16) for s in ((8, 2), (2, 8), (8, 2), (2, 8))
    )
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    update = single({**dict(zip(names, (w1a, w1b, w2a, w2b), strict=True)), "alpha": torch.tensor(5.0)})
    expected = (w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double()) * 2.5
    expanded = expand(update)
    assert expanded.exact and expanded.rank == 4
    product = expanded.tensors["up"].load().double() @ expanded.tensors["down"].load().double()
    torch.testing.assert_close(product * 2.5, expected, rtol=1e-12, atol=1e-14)


def test_products_of_fp32_factors_are_not_called_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"hada_w1_a": (8, 1), "hada_w1_b": (1, 8), "hada_w2_a": (8, 1), "hada_w2_b": (1, 8)}
    update = single({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    assert not expand(update).exact
