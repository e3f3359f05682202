"""Exact arithmetic on factors: folding a scale, Kronecker and Hadamard products as plain low-rank factors.

Every function here either returns something that it has proved equal, or says that it is not.

    lokr   kron(w1, w2) with w1 = p1 @ q1, w2 = p2 @ q2   =  kron(p1, p2) @ kron(q1, q2)
    loha   (a1 @ b1) * (a2 @ b2)   =  up @ down with up[:, (i, j)] = a1[:, i] * a2[:, j], down alike
    (Khatri-Rao)

A whole factor w is w @ 1. Products of two 16-bit numbers fit fp32, so expanding bf16 or fp16 files is exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusers_qwenimage.lora.updates import EXPONENTS, LoraUpdate, StoredTensor

MAX_EXACT_BITS = 29  # a product of these with the 24 bits of fp32 is exact in fp64


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Factors with the scale inside: `role` is the factor that was multiplied; `exact` whether nothing
    rounded."""

    tensors: dict[str, StoredTensor]
    role: str
    exact: bool
    upcast: bool


def fold_scale(
    update: LoraUpdate, *, allow_rounding: bool, roles: tuple[str, str] = ("up", "down")
) -> Folded | None:
    """Multiply the scale into one of two factors; None if no way is exact and rounding is not allowed.

    Tried in turn: the first factor, the second, both in their own type, then in fp32. Each is compared with
    the product in fp64 before it is taken. With rounding allowed, the first factor is rounded to fp32 as the
    last resort.
    """
    scale = update.scale.value
    if is_short(update.scale.exact):
        for upcast in (False, True):
            for role in roles:
                source = update.tensors[role]
                dtype = torch.float32 if upcast and source.dtype.itemsize < 4 else source.dtype
                if _product_is_exact(update.load(role), scale, dtype):
                    return _folded(update, role, scale, dtype, exact=True)
    if not allow_rounding:
        return None
    dtype = update.tensors[roles[0]].dtype
    return _folded(update, roles[0], scale, torch.float32 if dtype.itemsize < 4 else dtype, exact=False)


def is_short(scale: Fraction | None) -> bool:
    """Whether products of fp32 numbers with this scale are exact in fp64."""
    if scale is None or scale.denominator & (scale.denominator - 1):
        return False
    return abs(scale.numerator).bit_length() <= MAX_EXACT_BITS


def exact_power_product(factor: Tensor, scale: float) -> Tensor | None:
    """`factor * scale` in the factor's own type, if the scale is a power of two that only moves the
    exponents.

    None if it is not, or if a number is or becomes subnormal or infinite: then nothing is proved either way.
    This is the common case, and much quicker than a comparison in fp64.
    """
    mantissa, shift = math.frexp(scale)
    if mantissa not in (0.5, -0.5) or factor.dtype not in EXPONENTS or factor.dtype.itemsize == 1:
        return None
    integer, mask = EXPONENTS[factor.dtype]
    bits = factor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().view(integer)
    sign_bit = (np.iinfo(integer).max >> 1) + 1
    magnitudes = np.bitwise_and(bits, sign_bit - 1)
    one = mask & -mask  # the lowest bit of the exponent
    largest = int(magnitudes.max(initial=0))
    smallest = int((magnitudes - integer(1)).min(initial=mask)) + 1  # 0 - 1 wraps round: zeros are left out
    lowest, highest = smallest // one, largest // one
    if largest and (lowest < 1 or lowest + shift - 1 < 1 or highest + shift - 1 >= mask // one):
        return None
    added = integer((shift - 1) * one % (2 * sign_bit))
    moved = bits + added * (magnitudes != 0)
    if scale < 0:
        moved ^= integer(sign_bit)
    return torch.from_numpy(moved.view(np.uint8)).view(factor.dtype).reshape(factor.shape)


def _product_is_exact(factor: Tensor, scale: float, dtype: torch.dtype) -> bool:
    if dtype == factor.dtype and exact_power_product(factor, scale) is not None:
        return True
    product = factor.double() * scale
    return torch.equal(product.to(dtype).double(), product)


def _folded(update: LoraUpdate, role: str, scale: float, dtype: torch.dtype, *, exact: bool) -> Folded:
    source = update.tensors[role]
    tensors = {name: tensor for name, tensor in update.tensors.items() if name != "alpha"}
    tensors[role] = derived(source.key, dtype, source.shape, partial(_multiply, source, scale, dtype))
    return Folded(tensors=tensors, role=role, exact=exact, upcast=dtype != source.dtype)


def _multiply(source: StoredTensor, scale: float, dtype: torch.dtype) -> Tensor:
    factor = source.load()
    quick = exact_power_product(factor, scale) if dtype == factor.dtype else None
    return quick if quick is not None else (factor.double() * scale).to(dtype)


def derived(key: str, dtype: torch.dtype, shape: tuple[int, ...], load: Callable[[], Tensor]) -> StoredTensor:
    """A tensor that is computed when it is read."""
    return StoredTensor(key=key, dtype=dtype, shape=shape, load=load)


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """Plain factors of a LoKr or LoHa update, without its scale."""

    tensors: dict[str, StoredTensor]
    rank: int
    exact: bool


def expanded_rank(update: LoraUpdate) -> int:
    """The rank that a LoKr or LoHa update has as plain factors."""
    if update.kind == "loha":
        return update.tensors["hada_w1_b"].shape[0] ** 2
    rank = 1
    for name in ("lokr_w1", "lokr_w2"):
        whole = update.tensors.get(name)
        rank *= min(whole.shape) if whole else update.tensors[f"{name}_b"].shape[0]
    return rank


def expand(update: LoraUpdate) -> Expanded:
    """LoKr or LoHa as an up and a down factor in fp32 (fp64 files: fp64), and whether these are exact."""
    assert update.shape is not None
    dtypes = {tensor.dtype for role, tensor in update.tensors.items() if role != "alpha"}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    rank = expanded_rank(update)
    shapes = {"up": (update.shape[0], rank), "down": (rank, update.shape[1])}
    tensors, exact = {}, True
    for role, index in (("up", 0), ("down", 1)):
        product = expanded_factors(update)[index]
        exact = exact and bool((product.to(dtype).double() == product).all())
        key = next(iter(update.tensors.values())).key
        tensors[role] = derived(key, dtype, shapes[role], partial(_expanded, update, index, dtype))
    return Expanded(tensors=tensors, rank=rank, exact=exact)


def _expanded(update: LoraUpdate, index: int, dtype: torch.dtype) -> Tensor:
    return expanded_factors(update)[index].to(dtype)


def expanded_factors(update: LoraUpdate) -> tuple[Tensor, Tensor]:
    """(up [out, k], down [k, in]) of a LoKr or LoHa update in fp64, without its scale."""
    if update.kind == "loha":
        a1, b1, a2, b2 = (
            update.load(role).double() for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        )
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        return up, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    (p1, q1), (p2, q2) = (_factor_pair(update, name) for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(p1, p2), torch.kron(q1, q2)


def update_factors(update: LoraUpdate) -> tuple[Tensor, Tensor]:
    """(P [out, k], Q [k, in]) in fp64 with P @ Q the change of the weight, scale included.

    A full difference is its own P with the identity as Q, which is returned as an empty tensor.

    Raises:
        ValueError: for kinds whose change depends on the base weights.
    """
    match update.kind:
        case "lora" | "dora":
            return update.load("up").double() * update.scale.value, update.load("down").double()
        case "embedding":
            up, down = update.load("embedding_up").double(), update.load("embedding_down").double()
            return down.T * update.scale.value, up.T
        case "lokr" | "loha":
            up, down = expanded_factors(update)
            return up * update.scale.value, down
        case "diff" | "diff_b":
            return update.load(update.kind).double(), torch.empty(0)
    raise ValueError(f"The change by {update.kind} of {update.module} depends on the base weights.")


def delta_weight(update: LoraUpdate) -> Tensor:
    """The change of the weight [out, in] (or of the bias [out]) as a full matrix in fp64, scale included.

    A linear of Qwen-Image is up to 300 MB of these; `changed_weight` applies an update without it.

    Raises:
        ValueError: for kinds whose change depends on the base weights.
    """
    return multiplied(*update_factors(update))


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """The change, [out, in] or [out], that the factors of `update_factors` stand for."""
    return left @ right if right.numel() else left


def _factor_pair(update: LoraUpdate, name: str) -> tuple[Tensor, Tensor]:
    if name not in update.tensors:
        return update.load(f"{name}_a").double(), update.load(f"{name}_b").double()
    whole = update.load(name).double()
    if whole.shape[0] < whole.shape[1]:
        return torch.eye(whole.shape[0], dtype=torch.float64), whole
    return whole, torch.eye(whole.shape[1], dtype=torch.float64)
