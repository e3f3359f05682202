"""Whether two LoRA files change the weights alike: proved bit for bit where possible, else bounded in fp64.

The change of a weight is never materialised for low-rank updates. With P = [s1 B1, -s2 B2] and Q = [A1; A2],
the difference is P Q, and with QR factors of P and of the transpose of Q

    | s1 B1 A1 - s2 B2 A2 |_F  =  | R_P R_Q^T |_F

a matrix of the size of the ranks. That has no cancellation, unlike the trace formula on Gram matrices. What
is reported is a bound: the norm above plus the rounding error of fp64, relative to the norm of the first
change.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from diffusers_qwenimage.lora.factors import (
    exact_power_product,
    expanded_factors,
    is_short,
    multiplied,
    update_factors,
)
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.read import LoraFile
from diffusers_qwenimage.lora.updates import LoraUpdate, equal_bits

EPSILON = torch.finfo(torch.float64).eps
NUM_ROUNDINGS = 64  # a QR factorisation errs by a small multiple of epsilon; its constant is far below this
_INFINITE = float("inf")


@dataclass(frozen=True, kw_only=True)
class ModuleDifference:
    """How one parameter differs between two files.

    Attributes:
        module: path of the module, with "(bias)" for a change of the bias.
        exact: whether equality was proved bit for bit.
        same_bits: whether also all tensors have the same type and bits.
        bound: upper bound of the relative difference in the Frobenius norm; 0 if exact; inf if one file has
            no change there or the kinds cannot be compared.
        note: why the bound is infinite.
    """

    module: str
    exact: bool
    same_bits: bool
    bound: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences of all modules of two files."""

    modules: tuple[ModuleDifference, ...]

    @property
    def exact(self) -> bool:
        """Whether every change was proved equal."""
        return all(module.exact for module in self.modules)

    @property
    def same_bits(self) -> bool:
        """Whether every tensor has the same type and bits."""
        return all(module.same_bits for module in self.modules)

    @property
    def bound(self) -> float:
        """The largest relative difference of a module."""
        return max((module.bound for module in self.modules), default=0.0)

    @property
    def num_exact(self) -> int:
        """Number of changes that were proved equal."""
        return sum(module.exact for module in self.modules)

    def summary(self) -> str:
        """One line for people."""
        total = len(self.modules)
        if self.exact:
            how = "same bits" if self.same_bits else "same numbers"
            return f"delta-W equal in all {total} changes, proved bit by bit ({how}); bound 0"
        worst = max(self.modules, key=lambda module: module.bound)
        return (
            f"delta-W proved equal in {self.num_exact} of {total} changes; relative difference at most "
            f"{self.bound:.2e} ({worst.module}{': ' + worst.note if worst.note else ''})"
        )


def compare_files(
    first: LoraFile, second: LoraFile, *, progress: Callable[[int], None] | None = None
) -> Comparison:
    """Compare two files module by module; one module is in memory at a time."""
    return compare_updates(
        split_all(first.updates, first.architecture),
        split_all(second.updates, second.architecture),
        progress=progress,
    )


def compare_updates(
    first: Iterable[LoraUpdate],
    second: Iterable[LoraUpdate],
    *,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare two lists of updates, without fused modules."""
    ours, theirs = _by_parameter(first), _by_parameter(second)
    modules = []
    for key in dict.fromkeys((*ours, *theirs)):
        modules.append(_compare(key, ours.get(key), theirs.get(key)))
        if progress:
            progress(sum(tensor.num_bytes for tensor in ours[key].tensors.values()) if key in ours else 0)
    return Comparison(modules=tuple(modules))


def _by_parameter(updates: Iterable[LoraUpdate]) -> dict[tuple[str, str], LoraUpdate]:
    return {(f"{u.component}/{u.module}", "bias" if u.kind == "diff_b" else "weight"): u for u in updates}


def _compare(key: tuple[str, str], first: LoraUpdate | None, second: LoraUpdate | None) -> ModuleDifference:
    module = key[0].removeprefix("transformer/") + (" (bias)" if key[1] == "bias" else "")
    if first is None or second is None:
        note = f"only the {'second' if first is None else 'first'} file changes it"
        return ModuleDifference(module=module, exact=False, same_bits=False, bound=_INFINITE, note=note)
    problem = _incomparable(first, second)
    if problem:
        return ModuleDifference(module=module, exact=False, same_bits=False, bound=_INFINITE, note=problem)
    same_tensors = _same_bits(first, second)
    if same_tensors and first.scale.exact == second.scale.exact and first.scale.value == second.scale.value:
        return ModuleDifference(module=module, exact=True, same_bits=True, bound=0.0)
    extras = max(_vector_difference(first, second, role) for role in ("magnitude", "up_bias"))
    if extras == 0 and _proved_equal(first, second):
        return ModuleDifference(module=module, exact=True, same_bits=False, bound=0.0)
    bound = max(extras, _bound(update_factors(first), update_factors(second)))
    return ModuleDifference(module=module, exact=False, same_bits=False, bound=bound)


def _incomparable(first: LoraUpdate, second: LoraUpdate) -> str:
    needs_base = {"glora", "oft", "ia3", "set_weight"}
    if first.kind != second.kind and needs_base & {first.kind, second.kind}:
        return f"{first.kind} and {second.kind} cannot be compared without the base weights"
    if first.kind in needs_base and not _same_bits(first, second):
        return f"the tensors of its {first.kind} differ"
    if first.magnitude_axis != second.magnitude_axis:
        return "a DoRA magnitude is in one file only, or along another axis"
    if first.shape != second.shape:
        return f"the shapes differ: {first.shape} and {second.shape}"
    return ""


def _same_bits(first: LoraUpdate, second: LoraUpdate) -> bool:
    """Whether both hold the same factors, bit by bit; a magnitude may be [out] or [out, 1]."""
    roles = set(first.tensors) - {"alpha"}
    if first.kind != second.kind or roles != set(second.tensors) - {"alpha"}:
        return False
    if any(_stored_shape(first, role) != _stored_shape(second, role) for role in roles):
        return False
    return all(equal_bits(first.load(role), second.tensors[role].load()) for role in sorted(roles))


def _stored_shape(update: LoraUpdate, role: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape of a tensor; a magnitude may be [out] or [out, 1]."""
    tensor = update.tensors[role]
    if role == "magnitude" and update.magnitude_axis == "output":
        return tensor.dtype, tensor.shape[:1]
    return tensor.dtype, tensor.shape


def _proved_equal(first: LoraUpdate, second: LoraUpdate) -> bool:
    """Whether the factors are equal up to the ratio of the scales, with exact products only."""
    if first.kind == second.kind == "lora" and _equal_after_shift(first, second):
        return True
    plain = [
        (_plain_factors(update), update.scale)
        for update in (first, second)
        if update.kind not in ("diff", "diff_b")
    ]
    if len(plain) < 2:
        return first.kind == second.kind and torch.equal(
            first.load(first.kind).double(), second.load(second.kind).double()
        )
    ((up1, down1), scale1), ((up2, down2), scale2) = plain
    if up1.shape != up2.shape or down1.shape != down2.shape:
        return False
    if scale1.exact is not None and scale1.exact == scale2.exact:
        return torch.equal(up1, up2) and torch.equal(down1, down2)
    if not is_short(scale1.exact) or not is_short(scale2.exact):
        return False
    if not all(_fits_fp32(factor) for factor in (up1, down1, up2, down2)):
        return False
    if torch.equal(down1, down2):
        return torch.equal(up1 * scale1.value, up2 * scale2.value)
    return torch.equal(up1, up2) and torch.equal(down1 * scale1.value, down2 * scale2.value)


def _equal_after_shift(first: LoraUpdate, second: LoraUpdate) -> bool:
    """Whether the bits agree when the ratio of the scales, a power of two, is multiplied into one factor."""
    if first.scale.exact is None or not second.scale.exact:
        return False
    ratio = first.scale.exact / second.scale.exact
    if Fraction(float(ratio)) != ratio:
        return False
    for scaled, other in (("up", "down"), ("down", "up")):
        if equal_bits(first.tensors[other].load(), second.tensors[other].load()):
            product = exact_power_product(first.load(scaled), float(ratio))
            return product is not None and equal_bits(product, second.load(scaled))
    return False


def _fits_fp32(factor: Tensor) -> bool:
    """Whether products with a short scale are exact in fp64."""
    return torch.equal(factor, factor.float().double())


def _plain_factors(update: LoraUpdate) -> tuple[Tensor, Tensor]:
    if update.kind in ("lokr", "loha"):
        return expanded_factors(update)
    names = ("embedding_up", "embedding_down") if update.kind == "embedding" else ("up", "down")
    up, down = (update.load(role).double() for role in names)
    return up, down


def _vector_difference(first: LoraUpdate, second: LoraUpdate, role: str) -> float:
    """The relative difference of a magnitude, or of a bias times its scale; a missing bias is zero."""
    vectors = []
    for update in (first, second):
        scale = update.scale.value if role == "up_bias" else 1.0
        tensor = update.load(role).double().reshape(-1) if role in update.tensors else torch.zeros(1)
        vectors.append(tensor.double() * scale)
    reference = float(vectors[0].norm())
    difference = float((vectors[0] - vectors[1]).norm())
    return 0.0 if difference == 0 else difference / reference if reference else _INFINITE


def _bound(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    if not first[1].numel() or not second[1].numel():
        return _dense_bound(first, second)
    left = torch.cat([first[0], -second[0]], dim=1)
    right = torch.cat([first[1], second[1]], dim=0)
    reference = _product_norm(*first)
    rounding = NUM_ROUNDINGS * EPSILON * float(left.norm()) * float(right.norm())
    difference = _product_norm(left, right) + rounding
    return difference / reference if reference else (0.0 if not _product_norm(*second) else _INFINITE)


def _product_norm(left: Tensor, right: Tensor) -> float:
    """The Frobenius norm of left @ right through QR factors."""
    r_left = torch.linalg.qr(left, mode="r").R
    r_right = torch.linalg.qr(right.T, mode="r").R
    return float((r_left @ r_right.T).norm())


def _dense_bound(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    one, two = multiplied(*first), multiplied(*second)
    reference = float(one.norm())
    difference = float((one - two).norm()) + NUM_ROUNDINGS * EPSILON * (reference + float(two.norm()))
    return difference / reference if reference else (0.0 if not float(two.norm()) else _INFINITE)


def worst(comparison: Comparison, number: int) -> Sequence[ModuleDifference]:
    """The modules that differ most, the worst first."""
    return sorted((m for m in comparison.modules if not m.exact), key=lambda m: -m.bound)[:number]
