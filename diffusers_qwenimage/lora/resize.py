"""Another rank for a LoRA: the best approximation of each change, found on the factors alone.

    up = Q1 R1,  down^T = Q2 R2,   R1 R2^T = U S V^T   =>   s up down = (Q1 U sqrt(sS)) (sqrt(sS) V^T Q2^T)

The decomposition is of a rank x rank matrix, in fp64; the change itself, [out, in], is never made. Nothing is
centred and no singular value clamped. The error that is reported is that of the factors as they are written,
with their rounding, relative to the change in the Frobenius norm.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusers_qwenimage.lora.approximate import truncated_svd
from diffusers_qwenimage.lora.compose import compose, write_composed
from diffusers_qwenimage.lora.convert import Conversion
from diffusers_qwenimage.lora.factors import update_factors
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.metadata import STRUCTURE_KEYS
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.render import Options
from diffusers_qwenimage.lora.updates import LoraUpdate, Scale, stored
from diffusers_qwenimage.lora.write import Progress

# How many singular values of a full matrix are looked at where the rule names no rank.
MAX_RANK_OF_MATRIX = 512
PIECE = 1 << 20  # elements
ROUNDING_OF_ENERGY = 1e-6  # sums of squares in fp32 differ from each other by less


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """How the rank of a module is chosen; of several rules the smallest rank counts.

    Attributes:
        rank: at most this.
        energy: the smallest rank that keeps this share of the squared Frobenius norm, in (0, 1].
        threshold: only singular values of at least this share of the largest one, in (0, 1].
    """

    rank: int | None = None
    energy: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None and self.threshold is None:
            raise ValueError("Say what rank is wanted: give a rank, a share of energy, or a threshold.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"A rank is at least 1, got {self.rank}.")
        for name in ("energy", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}.")

    def choose(self, values: Tensor, squared_norm: float) -> int:
        """The rank for singular values, the largest first, of a change of that norm; at least 1."""
        rank = values.numel() if self.rank is None else min(self.rank, values.numel())
        if self.threshold is not None:
            rank = min(rank, int((values >= self.threshold * values[0]).sum()))
        if self.energy is not None:
            kept = values.double().square().cumsum(0)
            enough = self.energy * squared_norm * (1 - ROUNDING_OF_ENERGY)
            rank = min(rank, 1 + int((kept < enough).sum()))
        return max(rank, 1)


@dataclass(frozen=True, kw_only=True)
class ModuleError:
    """What happened to one change: ranks before and after, squared norms of the change and of the error."""

    module: str
    old_rank: int | None
    new_rank: int
    squared_norm: float
    squared_error: float

    @property
    def relative_error(self) -> float:
        """|error| / |change| in the Frobenius norm; 0 for a change of zero."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


@dataclass(frozen=True, kw_only=True)
class Resized:
    """A resized (or extracted) LoRA: what was written, and the error of each module."""

    conversion: Conversion
    modules: tuple[ModuleError, ...]

    @property
    def relative_error(self) -> float:
        """|all errors| / |all changes| in the Frobenius norm."""
        total = sum(module.squared_norm for module in self.modules)
        return (sum(module.squared_error for module in self.modules) / total) ** 0.5 if total else 0.0

    @property
    def worst(self) -> ModuleError | None:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda module: module.relative_error, default=None)


def resize_lora(
    source: str | Path,
    output: str | Path,
    rule: RankRule,
    *,
    to: str = "opensource",
    dtype: torch.dtype | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Resized:
    """Write a LoRA file with other ranks.

    Args:
        source: a LoRA file or PEFT folder. Modules whose rank is already small enough are copied bit by bit.
        output: the file to write, in the spelling of the target `to`.
        rule: how ranks are chosen.
        dtype: of the new factors; None keeps that of the old ones. Rounding to 16 bits costs about 2e-3.
        options: how far the target's spelling may go, see `Options`.
        progress: called with the bytes that were done.

    Raises:
        ValueError: if a kind of update has no factors (DoRA, whose magnitude would not fit any more).
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} is the input; name another file.")
    file = read_lora(source)
    updates, errors = [], []
    for update in split_all(file.updates, file.architecture):
        resized, error = resize_update(update, rule, dtype=dtype)
        updates.append(resized)
        errors += [error] if error else []
        if progress:
            progress(sum(tensor.num_bytes for tensor in update.tensors.values()))
    structural = {key: value for key, value in file.metadata.items() if key not in STRUCTURE_KEYS}
    conversion = write_composed(
        compose(updates, name=f"{source}, resized", metadata=structural),
        output,
        to,
        metadata={},
        options=options,
        progress=progress,
    )
    return Resized(conversion=conversion, modules=tuple(errors))


def resize_update(
    update: LoraUpdate, rule: RankRule, *, dtype: torch.dtype | None = None
) -> tuple[LoraUpdate, ModuleError | None]:
    """One update with another rank, and its error; differences of biases and norms stay as they are.

    Raises:
        ValueError: for a kind that has no plain factors (DoRA, GLoRA, OFT, ...).
    """
    if update.kind == "diff_b" or (update.kind == "diff" and len(update.shape or ()) != 2):
        return update, None
    if update.kind not in ("lora", "lokr", "loha", "diff") or "magnitude" in update.tensors:
        raise ValueError(
            f"{update.module} has a {'DoRA' if 'magnitude' in update.tensors else update.kind} update; only "
            "plain changes (lora, lokr, loha, diff) can be resized."
        )
    kept = dtype or _factor_dtype(update)
    if update.kind == "diff":
        up, down, values, total = _decomposed_matrix(update.load("diff").float(), rule)
    else:
        up, down, values, total = decompose(*update_factors(update))
    rank = rule.choose(values, total)
    if update.kind == "lora" and update.rank is not None and rank >= update.rank:
        error = ModuleError(
            module=update.module,
            old_rank=update.rank,
            new_rank=update.rank,
            squared_norm=total,
            squared_error=0.0,
        )
        return update, error
    resized, error = truncated(update, up, down, values, rank, total, kept)
    return resized, error


def decompose(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """(U [out, k], V^T [k, in], singular values [k], squared norm) of left @ right, on the factors alone."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    inner, values, outer = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ inner, outer @ q_right.T, values, float(values.square().sum())


def truncated(
    update: LoraUpdate,
    up: Tensor,
    down: Tensor,
    values: Tensor,
    rank: int,
    squared_norm: float,
    dtype: torch.dtype,
) -> tuple[LoraUpdate, ModuleError]:
    """The first `rank` terms of a decomposition as a LoRA update, and its error with the rounding to `dtype`.

    The error of the cut (the values left out) and that of the rounding (inside the kept space) are added as
    squares, since they are orthogonal up to the size of the rounding.
    """
    root = values[:rank].sqrt()
    exact_up, exact_down = up[:, :rank] * root, root[:, None] * down[:rank]
    new_up, new_down = exact_up.to(dtype).contiguous(), exact_down.to(dtype).contiguous()
    rounding = _squared_distance(exact_up, exact_down, new_up.to(exact_up.dtype), new_down.to(exact_up.dtype))
    cut = max(squared_norm - float(values[:rank].double().square().sum()), 0.0)
    if rank < values.numel():
        cut = max(cut, float(values[rank:].double().square().sum()))
    key = next(iter(update.tensors.values())).key
    resized = replace(
        update,
        kind="lora",
        tensors={"up": stored(key, new_up), "down": stored(f"{key} (down)", new_down)},
        scale=Scale(alpha=float(rank), rank=rank, source="key"),
    )
    error = ModuleError(
        module=update.module,
        old_rank=update.rank,
        new_rank=rank,
        squared_norm=squared_norm,
        squared_error=cut + rounding,
    )
    return resized, error


def summary(resized: Resized) -> list[str]:
    """The ranks and errors for people."""
    modules = resized.modules
    changed = [module for module in modules if module.new_rank != module.old_rank]
    ranks = sorted({module.new_rank for module in modules})
    spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
    lines = [f"{len(changed)} of {len(modules)} modules changed their rank; ranks now {spread}"]
    worst = resized.worst
    if worst is not None:
        lines.append(
            f"relative error {resized.relative_error:.3e} in all, at most {worst.relative_error:.3e} "
            f"({worst.module})"
        )
    return lines


def _decomposed_matrix(matrix: Tensor, rule: RankRule) -> tuple[Tensor, Tensor, Tensor, float]:
    """The leading terms of a full matrix, as many as the rule may want."""
    rank = min(rule.rank or MAX_RANK_OF_MATRIX, *matrix.shape)
    up, down = truncated_svd(matrix, rank)
    values = up.norm(dim=0).square()  # both factors carry the root of the singular value
    root = values.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return up / root, down / root[:, None], values, _squared_norm(matrix)


def _squared_norm(matrix: Tensor) -> float:
    """|matrix|^2 in fp64, in pieces: a copy of a large weight in fp64 would be most of the memory."""
    return sum(float(piece.double().square().sum()) for piece in matrix.reshape(-1).split(PIECE))


def _squared_distance(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> float:
    """|up down - other_up other_down|^2 in the Frobenius norm, from QR factors."""
    left = torch.cat([up, -other_up], dim=1).double()
    right = torch.cat([down, other_down], dim=0).double()
    r_left = torch.linalg.qr(left, mode="r").R
    r_right = torch.linalg.qr(right.T, mode="r").R
    return float((r_left @ r_right.T).square().sum())


def _factor_dtype(update: LoraUpdate) -> torch.dtype:
    """The type of the new factors: that of the old ones, at least 16 bits."""
    dtype = max(
        (tensor.dtype for role, tensor in update.tensors.items() if role != "alpha"),
        key=lambda dtype: dtype.itemsize,
    )
    return dtype if dtype.itemsize > 1 else torch.bfloat16
