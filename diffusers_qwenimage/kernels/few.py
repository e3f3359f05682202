"""Linear layers of few tokens, bf16 and fp16: the time is that of reading the weight.

The text stream has some hundred tokens. Their matrix products do little with every weight, and the vendor's
tiles for them are too few to keep a GPU's memory busy. Here the inputs of one output tile may be split over
several programs, whose fp32 sums are added in a fixed order by a second kernel.

    y[n, o] = sum_i x[n, i] * weight[o, i] + bias[o], then GELU (tanh) if wanted

Shapes: N tokens, I inputs, O outputs. The reference is `torch.nn.functional.linear`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from . import triton_is_installed
from .launch import Launcher, power_of_2

if triton_is_installed():
    import triton
    import triton.language as tl

most_tokens = 0  # with which `fits` says yes


class Tiles(NamedTuple):
    """How the work is cut.

    Attributes:
        columns: outputs of a program.
        depth: inputs per step.
        splits: programs that share the inputs of a tile.
        stages: steps that are loaded ahead.
        warps: per program.
    """

    columns: int
    depth: int
    splits: int
    stages: int
    warps: int


# 1. Reference


def few_linear_reference(x: Tensor, weight: Tensor, bias: Tensor, with_gelu: bool = False) -> Tensor:
    """y [N, O]."""
    y = linear(x, weight, bias)
    return gelu(y, approximate="tanh") if with_gelu else y


# 2. Triton

if triton_is_installed():

    @triton.jit
    def _finished(y, bias_ptr, column, has_column, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
        y += tl.load(bias_ptr + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
        if GELU:
            y = y / (1.0 + tl.exp(tl.minimum(y * (-1.5957691216057308 - 0.07135481282638786 * y * y), 80.0)))
        return y

    @triton.jit(do_not_specialize=["num_rows"])
    def _few_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        bias_ptr,
        out_ptr,  # [N, O] of any row stride, or fp32 [splits, N, O]
        num_rows,
        INPUTS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        OUT_STRIDE: tl.constexpr,
        SPLITS: tl.constexpr,
        GELU: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        split = tl.program_id(1)
        row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        depth = split * (INPUTS // SPLITS) + tl.arange(0, DEPTH)
        has_row = row < num_rows
        has_column = column < OUTPUTS
        x = x_ptr + row[:, None] * INPUTS + depth[None, :]
        weight = weight_ptr + column[None, :].to(tl.int64) * INPUTS + depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for _ in range(0, INPUTS // SPLITS, DEPTH):
            a = tl.load(x, mask=has_row[:, None], other=0.0)
            b = tl.load(weight, mask=has_column[None, :], other=0.0)
            total = tl.dot(a, b, total)
            x += DEPTH
            weight += DEPTH
        inside = has_row[:, None] & has_column[None, :]
        if SPLITS == 1:
            total = _finished(total, bias_ptr, column, has_column, GELU)
            to = out_ptr + row[:, None].to(tl.int64) * OUT_STRIDE + column[None, :]
        else:
            to = out_ptr + (split * num_rows + row[:, None]).to(tl.int64) * OUTPUTS + column[None, :]
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["num_rows"])
    def _sum_kernel(  # type: ignore[no-untyped-def]
        sums_ptr,
        bias_ptr,
        out_ptr,
        num_rows,
        OUTPUTS: tl.constexpr,
        OUT_STRIDE: tl.constexpr,
        SPLITS: tl.constexpr,
        GELU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        has_column = column < OUTPUTS
        y = tl.zeros((1, BLOCK), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            part = sums_ptr + (split * num_rows + row) * OUTPUTS + column
            y += tl.load(part, mask=has_column, other=0.0)[None, :]
        y = _finished(y, bias_ptr, column, has_column, GELU)
        to = out_ptr + row * OUT_STRIDE + column[None, :]
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=has_column[None, :])

    _run = Launcher(_few_kernel)
    _run_sum = Launcher(_sum_kernel)


# 3. Public


def tiles_for(inputs: int, outputs: int) -> Tiles:
    """The cut for a layer of these sizes: about two programs for each of an H100's 132 processors."""
    columns = 64
    splits = 1
    while splits < 8 and -(-outputs // columns) * splits < 128 and inputs % (2 * splits * 64) == 0:
        splits *= 2
    return Tiles(columns=columns, depth=64, splits=splits, stages=4, warps=4)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_linear` can multiply these, and should."""
    if not 0 < x.shape[0] <= most_tokens:
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return False
    return x.shape[1] % 64 == 0 and x.is_contiguous() and weight.is_contiguous()


def few_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None = None,
    *,
    with_gelu: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """The linear layer of x [N, I]: [N, O], written into `out` (rows of any stride) if given. No gradients.

    Triton only; see `fits` for what it takes.
    """
    (num_rows, inputs), outputs = x.shape, weight.shape[0]
    cut = tiles_for(inputs, outputs) if tiles is None else tiles
    y = torch.empty((num_rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    rows = min(max(power_of_2(num_rows), 16), 128)
    grid = (-(-outputs // cut.columns), cut.splits, -(-num_rows // rows))
    to = y
    if cut.splits > 1:
        to = torch.empty((cut.splits, num_rows, outputs), dtype=torch.float32, device=x.device)
    constants = (inputs, outputs, y.stride(0), cut.splits, with_gelu, rows, cut.columns, cut.depth)
    _run(grid, (x, weight, bias, to), (num_rows,), constants, cut.warps, num_stages=cut.stages)
    if cut.splits > 1:
        block = min(power_of_2(outputs), 1024)
        sizes = (outputs, y.stride(0), cut.splits, with_gelu, block)
        _run_sum((-(-outputs // block), num_rows, 1), (to, bias, y), (num_rows,), sizes, 4)
    return y
