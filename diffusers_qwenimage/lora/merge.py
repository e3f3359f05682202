"""Several LoRAs as one: their ranks side by side, which is exact. No decomposition, nothing cut.

    w1 s1 B1 A1 + w2 s2 B2 A2   =   [w1 s1 B1, w2 s2 B2] @ [A1; A2]

Where all products of weight and scale in a module are equal, that number becomes the scale of the merged
update and the factors are copied bit by bit. Otherwise each goes into its own factor: exactly where the type
allows, else rounded to fp32. The rank of a module is the sum of the ranks; `resize.py` makes it smaller.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusers_qwenimage.lora.compose import compose, write_composed
from diffusers_qwenimage.lora.convert import Conversion
from diffusers_qwenimage.lora.factors import derived, expand, expanded_rank, fold_scale
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.read import LoraFile, read_lora
from diffusers_qwenimage.lora.render import Options
from diffusers_qwenimage.lora.updates import LoraUpdate, Scale, StoredTensor, stored, unit_scale
from diffusers_qwenimage.lora.write import Progress

MERGE_KEY = "diffusers_qwenimage.merge"  # metadata: what was merged
MODEL_KEYS = ("ss_base_model_version", "modelspec.architecture")  # kept where all sources agree
Weighted = tuple[LoraUpdate, float]


def merge_loras(
    sources: Sequence[tuple[str | Path, float]],
    output: str | Path,
    to: str = "opensource",
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the weighted sum of LoRA files as one file.

    Args:
        sources: (file, weight) pairs; a negative weight subtracts.
        output: the file to write, in the spelling of the target `to`.
        options: how far the target's spelling may go, see `Options`.
        progress: called with the bytes that were done.

    Raises:
        ValueError: if a file cannot be read, two updates of a module cannot be added, or the written file
            differs from the sum by more than the rounding of fp32. Nothing is left at `output` then.
    """
    if not sources:
        raise ValueError("Nothing to merge: name at least one file.")
    if any(Path(path).resolve() == Path(output).resolve() for path, _ in sources):
        raise ValueError(f"{output} is one of the inputs; name another file.")
    files = [(read_lora(path), weight) for path, weight in sources]
    merged, reference = merge_updates(files)
    listed = [{"name": Path(path).name, "weight": weight} for path, weight in sources]
    metadata = {**_common_metadata([file for file, _ in files]), MERGE_KEY: json.dumps(listed)}
    return write_composed(
        compose(merged, name="the merged LoRA", metadata=metadata),
        output,
        to,
        metadata=metadata,
        reference=reference,
        options=options,
        progress=progress,
    )


def merge_updates(files: Sequence[tuple[LoraFile, float]]) -> tuple[list[LoraUpdate], list[LoraUpdate]]:
    """The merged updates, and the same sum in fp64 to compare them with.

    Raises:
        ValueError: if a weight is not a finite number, or two updates of one module cannot be added.
    """
    groups: dict[tuple[str, str, bool], list[Weighted]] = {}
    for file, weight in files:
        if not torch.isfinite(torch.tensor(weight)):
            raise ValueError(f"The weight of {file.name} must be a finite number, got {weight}.")
        if weight == 0:
            continue
        for update in split_all(file.updates, file.architecture):
            key = (update.component, update.module, update.kind == "diff_b")
            groups.setdefault(key, []).append((update, weight))
    if not groups:
        raise ValueError("Nothing is left to merge: all weights are 0 or the files are empty.")
    pairs = [_merge(weighted) for weighted in groups.values()]
    return [merged for merged, _ in pairs], [reference for _, reference in pairs]


def _merge(weighted: Sequence[Weighted]) -> tuple[LoraUpdate, LoraUpdate]:
    first, weight = weighted[0]
    if len(weighted) == 1 and weight == 1:
        return first, first
    kinds = {update.kind for update, _ in weighted}
    if kinds <= {"diff"} or kinds <= {"diff_b"}:
        return _sum_of_differences(weighted)
    plain = [(_as_lora(update, weighted), weight) for update, weight in weighted]
    reference = _concatenated(plain, torch.float64, folded=True)
    numbers = {weight * update.scale.value for update, weight in plain}
    if len(numbers) == 1:
        merged = _concatenated(plain, None, folded=False)
        assert merged.rank is not None
        alpha = float(torch.tensor(numbers.pop() * merged.rank, dtype=torch.float32))
        return replace(merged, scale=Scale(alpha=alpha, rank=merged.rank, source="key")), reference
    folded = [(_fold(update, weight), 1.0) for update, weight in plain]
    return _concatenated(folded, None, folded=False), reference


def _as_lora(update: LoraUpdate, weighted: Sequence[Weighted]) -> LoraUpdate:
    """An update as plain factors with its scale; refuses what cannot be added exactly."""
    if update.kind == "lora" and "up_bias" not in update.tensors:
        return update
    if update.kind in ("lokr", "loha") and "magnitude" not in update.tensors:
        assert update.shape is not None
        if expanded_rank(update) < min(update.shape):
            return replace(update, kind="lora", tensors=expand(update).tensors)
    kinds = " and ".join(dict.fromkeys(other.kind for other, _ in weighted))
    reason = {
        "dora": "a DoRA magnitude applies to the changed weight, so changes do not add up",
        "lora": "it has a bias of its up factor",
        "diff": "a full difference and a low-rank change have no common low-rank form",
    }.get(update.kind, f"{update.kind} has no plain factors of a lower rank than the weight")
    raise ValueError(
        f"The updates of {update.module} ({kinds}) cannot be merged exactly: {reason}. Bake them into the "
        "checkpoint one after the other instead (`qwenimage lora bake`)."
    )


def _fold(update: LoraUpdate, weight: float) -> LoraUpdate:
    rank = update.tensors["down"].shape[0]
    scale = Scale(alpha=weight * update.scale.value * rank, rank=rank, source="key")
    folded = fold_scale(replace(update, scale=scale), allow_rounding=True)
    assert folded is not None
    return replace(update, tensors=folded.tensors, scale=unit_scale(rank))


def _concatenated(weighted: Sequence[Weighted], dtype: torch.dtype | None, *, folded: bool) -> LoraUpdate:
    """The factors side by side, in their own type (or fp32, or `dtype`); with the scales if `folded`."""
    updates = [update for update, _ in weighted]
    ups, downs = ([update.tensors[role] for update in updates] for role in ("up", "down"))
    if len({tensor.shape[0] for tensor in ups}) > 1 or len({tensor.shape[1] for tensor in downs}) > 1:
        shapes = ", ".join(str(list(update.shape or ())) for update in updates)
        raise ValueError(
            f"The updates of {updates[0].module} have different shapes: {shapes}. They are of different "
            "models."
        )
    dtype = dtype or _common_dtype([*ups, *downs])
    factors = [weight * update.scale.value if folded else 1.0 for update, weight in weighted]
    rank = sum(tensor.shape[0] for tensor in downs)
    one = [1.0] * len(downs)
    tensors = {
        "up": derived(
            ups[0].key, dtype, (ups[0].shape[0], rank), partial(_concatenate, ups, factors, dtype, 1)
        ),
        "down": derived(
            downs[0].key, dtype, (rank, downs[0].shape[1]), partial(_concatenate, downs, one, dtype, 0)
        ),
    }
    return replace(updates[0], kind="lora", tensors=tensors, scale=unit_scale(rank))


def _concatenate(
    tensors: Sequence[StoredTensor], factors: Sequence[float], dtype: torch.dtype, axis: int
) -> Tensor:
    parts = [
        tensor.load().to(dtype) * factor if factor != 1 else tensor.load().to(dtype)
        for tensor, factor in zip(tensors, factors, strict=True)
    ]
    return torch.cat(parts, dim=axis)


def _sum_of_differences(weighted: Sequence[Weighted]) -> tuple[LoraUpdate, LoraUpdate]:
    first = weighted[0][0]
    role = first.kind
    shapes = {update.tensors[role].shape for update, _ in weighted}
    if len(shapes) > 1:
        raise ValueError(f"The differences of {first.module} have different shapes: {sorted(shapes)}.")
    total = torch.zeros(shapes.pop(), dtype=torch.float64)
    for update, weight in weighted:
        total += update.load(role).double() * weight
    dtype = _common_dtype([update.tensors[role] for update, _ in weighted])
    exact = bool((total.to(dtype).double() == total).all())
    rounded = total.to(dtype if exact or dtype.itemsize > 4 else torch.float32)
    key = first.tensors[role].key
    return (
        replace(first, tensors={role: stored(key, rounded)}),
        replace(first, tensors={role: stored(key, total)}),
    )


def _common_dtype(tensors: Sequence[StoredTensor]) -> torch.dtype:
    """The type that holds all of them exactly: their own if they agree, else fp32 or fp64."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _common_metadata(files: Sequence[LoraFile]) -> Mapping[str, str]:
    common = {}
    for key in MODEL_KEYS:
        values = {file.metadata.get(key) for file in files}
        value = values.pop()
        if not values and value is not None:
            common[key] = value
    return common
