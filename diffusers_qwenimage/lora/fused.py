"""Fused projections: q, k and v of one input as one update, and back.

    block_diagonal(up_q, up_k, up_v) @ concatenate(down_q, down_k, down_v)

Both ways are exact: numbers are only moved. A projection without an update becomes rows of zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffusers_qwenimage.lora.architectures import Architecture
from diffusers_qwenimage.lora.factors import derived
from diffusers_qwenimage.lora.updates import LoraUpdate, StoredTensor, unit_scale


def split_all(updates: Sequence[LoraUpdate], architecture: Architecture) -> list[LoraUpdate]:
    """Replace the LoRA updates of fused modules by those of their parts; the others stay as they are."""
    result: list[LoraUpdate] = []
    for update in updates:
        parts = architecture.parts(update.module) if update.component == "transformer" else None
        result += split_fused(update, parts) if parts and update.kind == "lora" else [update]
    return result


def split_fused(update: LoraUpdate, parts: Sequence[str]) -> list[LoraUpdate]:
    """The updates of the parts of a fused module.

    Each part gets its rows of the up factor. If that factor is block-diagonal, each part also gets only its
    columns, and those rows of the down factor: what was fused comes back bit for bit. A part without columns
    has no update. A factor that is not block-diagonal is shared: each part keeps the full rank.
    """
    up, down = update.tensors["up"], update.tensors["down"]
    num_rows = up.shape[0] // len(parts)
    columns = _block_columns(update.load("up"), len(parts))
    updates = []
    for index, (module, (first, last)) in enumerate(zip(parts, columns, strict=True)):
        if first == last:
            continue
        rows = slice(index * num_rows, (index + 1) * num_rows)
        tensors = {
            "up": _part(up, rows, slice(first, last)),
            "down": _part(down, slice(first, last), slice(0, down.shape[1])),
        }
        updates.append(replace(update, module=module, tensors=tensors))
    return updates


def fuse(module: str, parts: Sequence[str], updates: Mapping[str, LoraUpdate]) -> LoraUpdate:
    """One update of a fused module from those of its parts, whose scales must be 1.

    Raises:
        ValueError: if the parts do not fit together.
    """
    present = [updates[part] for part in parts if part in updates]
    assert present and all(update.kind == "lora" and update.scale.is_one for update in present)
    ups, downs = ([update.tensors[role] for update in present] for role in ("up", "down"))
    if len({tensor.shape[0] for tensor in ups}) > 1 or len({tensor.shape[1] for tensor in downs}) > 1:
        raise ValueError(f"The updates of {', '.join(u.module for u in present)} differ in shape.")
    rank = sum(tensor.shape[0] for tensor in downs)
    num_rows, width = ups[0].shape[0], downs[0].shape[1]
    dtype = _common_dtype([*ups, *downs])
    blocks = [(parts.index(update.module), update.tensors["up"]) for update in present]
    shape = (num_rows * len(parts), rank)
    tensors = {
        "up": derived(ups[0].key, dtype, shape, partial(_block_diagonal, blocks, shape, num_rows, dtype)),
        "down": derived(downs[0].key, dtype, (rank, width), partial(_concatenate, downs, dtype)),
    }
    return replace(present[0], module=module, tensors=tensors, scale=unit_scale(rank))


def fuse_shared(module: str, parts: Sequence[str], updates: Mapping[str, LoraUpdate]) -> LoraUpdate:
    """One update of a fused module from parts that have the same down factor: their rows, stacked."""
    present = [updates[part] for part in parts]
    ups, down = [update.tensors["up"] for update in present], present[0].tensors["down"]
    dtype, shape = _common_dtype(ups), (sum(up.shape[0] for up in ups), ups[0].shape[1])
    tensors = {"up": derived(ups[0].key, dtype, shape, partial(_concatenate, ups, dtype)), "down": down}
    return replace(present[0], module=module, tensors=tensors)


def _block_columns(up: Tensor, num_parts: int) -> list[tuple[int, int]]:
    """The (first, last) columns of each part: its block, or all columns if the factor is not
    block-diagonal."""
    rank = up.shape[1]
    used = torch.stack([block.double().ne(0).any(0) for block in up.chunk(num_parts)])  # [parts, rank]
    if rank % num_parts == 0:
        size = rank // num_parts
        equal = [(index * size, (index + 1) * size) for index in range(num_parts)]
        if _covers(used, equal):
            return equal
    # Unequal ranks: the blocks end where the last nonzero column of each part ends.
    columns, first = [], 0
    for row in used:
        last = max([first, *(int(index) + 1 for index in row.nonzero().flatten())])
        columns.append((first, last))
        first = last
    if columns[-1][0] < columns[-1][1]:
        columns[-1] = (columns[-1][0], rank)  # zero columns at the end stay somewhere
    return columns if _covers(used, columns) else [(0, rank)] * num_parts


def _covers(used: Tensor, columns: Sequence[tuple[int, int]]) -> bool:
    inside = torch.zeros_like(used)
    for index, (first, last) in enumerate(columns):
        inside[index, first:last] = True
    return not bool((used & ~inside).any())


def _part(source: StoredTensor, rows: slice, columns: slice) -> StoredTensor:
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return derived(source.key, source.dtype, shape, lambda: source.load()[rows, columns].contiguous())


def _common_dtype(tensors: Sequence[StoredTensor]) -> torch.dtype:
    """The type that holds all of them exactly: their own if they agree, else fp32 or fp64."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _block_diagonal(
    blocks: Sequence[tuple[int, StoredTensor]], shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> Tensor:
    result = torch.zeros(shape, dtype=dtype)
    column = 0
    for index, block in blocks:
        rank = block.shape[1]
        result[index * num_rows : (index + 1) * num_rows, column : column + rank] = block.load().to(dtype)
        column += rank
    return result


def _concatenate(tensors: Sequence[StoredTensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.load().to(dtype) for tensor in tensors])
