"""Attention of one wide head over the pixels of a picture (the autoencoder's middle block, 384 channels).

The fast attention kernels of the vendors end at 256 channels a head. This one keeps the head as three parts
of D / 3 channels: scores are the sum of three products, and the output is three accumulators. The running
maximum and sum over the keys are those of FlashAttention (arXiv 2205.14135), in fp32.

Shapes: B pictures, S pixels, D channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher, Variant

if triton_is_installed():
    import triton
    import triton.language as tl

_PARTS = 3
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a program of the kernel works: queries, keys at a time, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# The quickest of six on an H100, at 166x166 pixels of 384 channels (benchmarks/vae.py --cases attention).
TILE = Tile(queries=128, keys=32, warps=8, stages=2)


# 1. Reference


def wide_attention_reference(qkv: Tensor) -> Tensor:
    """Attention [B, S, D] of queries, keys and values [B, S, 3 D]."""
    query, key, value = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(query, key, value).squeeze(1)


# 2. Triton

if triton_is_installed():

    @triton.jit
    def _part(base, rows, inside, column, stride):  # type: ignore[no-untyped-def]
        return tl.load(base + rows[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0)

    @triton.jit(do_not_specialize=["num_pixels", "factor"])
    def _kernel(  # type: ignore[no-untyped-def]
        qkv_ptr,
        out_ptr,
        num_pixels,
        factor,
        PART: tl.constexpr,
        QUERIES: tl.constexpr,
        KEYS: tl.constexpr,
    ):
        D: tl.constexpr = 3 * PART
        STRIDE: tl.constexpr = 3 * D
        picture = tl.program_id(1).to(tl.int64)
        base = qkv_ptr + picture * num_pixels * STRIDE
        row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        is_row = row < num_pixels
        column = tl.arange(0, PART)
        row = row.to(tl.int64)
        q0 = _part(base, row, is_row, column, STRIDE)
        q1 = _part(base + PART, row, is_row, column, STRIDE)
        q2 = _part(base + 2 * PART, row, is_row, column, STRIDE)
        sum0 = tl.zeros([QUERIES, PART], dtype=tl.float32)
        sum1 = tl.zeros([QUERIES, PART], dtype=tl.float32)
        sum2 = tl.zeros([QUERIES, PART], dtype=tl.float32)
        largest = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
        weight = tl.zeros([QUERIES], dtype=tl.float32)
        for start in range(0, num_pixels, KEYS):
            other = start + tl.arange(0, KEYS)
            is_key = other < num_pixels
            other = other.to(tl.int64)
            scores = tl.dot(q0, tl.trans(_part(base + D, other, is_key, column, STRIDE)))
            scores = tl.dot(q1, tl.trans(_part(base + D + PART, other, is_key, column, STRIDE)), scores)
            scores = tl.dot(q2, tl.trans(_part(base + D + 2 * PART, other, is_key, column, STRIDE)), scores)
            scores = tl.where(is_key[None, :], scores * factor, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            shrink = tl.exp2(largest - new_largest)
            share = tl.exp2(scores - new_largest[:, None])
            weight = weight * shrink + tl.sum(share, 1)
            share = share.to(qkv_ptr.dtype.element_ty)
            sum0 = tl.dot(share, _part(base + 2 * D, other, is_key, column, STRIDE), sum0 * shrink[:, None])
            sum1 = tl.dot(
                share, _part(base + 2 * D + PART, other, is_key, column, STRIDE), sum1 * shrink[:, None]
            )
            sum2 = tl.dot(
                share, _part(base + 2 * D + 2 * PART, other, is_key, column, STRIDE), sum2 * shrink[:, None]
            )
            largest = new_largest
        out = out_ptr + (picture * num_pixels + row[:, None]) * D + column[None, :]
        inverse = (1.0 / weight)[:, None]
        tl.store(out, (sum0 * inverse).to(out_ptr.dtype.element_ty), mask=is_row[:, None])
        tl.store(out + PART, (sum1 * inverse).to(out_ptr.dtype.element_ty), mask=is_row[:, None])
        tl.store(out + 2 * PART, (sum2 * inverse).to(out_ptr.dtype.element_ty), mask=is_row[:, None])

    _run = Launcher(_kernel)


def _launch(qkv: Tensor, tile: Tile) -> Tensor:
    batch, num_pixels, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty(batch, num_pixels, channels)
    _run(
        (-(-num_pixels // tile.queries), batch, 1),
        (qkv, out),
        (num_pixels, _LOG2_E / channels**0.5),
        (channels // _PARTS, tile.queries, tile.keys),
        tile.warps,
        num_stages=tile.stages,
    )
    return out


def variants(channels: int, dtype: torch.dtype) -> list[Variant]:
    """What pictures of so many channels run."""
    if _why_not(channels, dtype) is not None:
        return []
    return [
        Variant(
            launcher=_run,
            types=(dtype, dtype),
            numbers=(1, 1.0),
            constants=(channels // _PARTS, TILE.queries, TILE.keys),
            num_warps=TILE.warps,
            num_stages=TILE.stages,
        )
    ]


# 3. Public, for inference: nothing here records gradients


def wide_attention(qkv: Tensor, tile: Tile = TILE) -> Tensor:
    """Attention [B, S, D] of queries, keys and values [B, S, 3 D], side by side."""
    if qkv.numel() and why_not(qkv) is None:
        return _launch(qkv.contiguous(), tile)
    return wide_attention_reference(qkv)


def why_not(qkv: Tensor) -> str | None:
    """Why the kernel does not take `qkv` [B, S, 3 D]; None if it does."""
    if backend(qkv.device).name != "triton":
        return "Triton is not what computes on this device"
    return _why_not(qkv.shape[-1] // 3, qkv.dtype)


def _why_not(channels: int, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies in half precision, not in {dtype}"
    part, rest = divmod(channels, _PARTS)
    if rest or part < 16 or part > 128 or part & (part - 1):
        return f"a head of {channels} channels is not three times 16, 32, 64 or 128"
    return None
