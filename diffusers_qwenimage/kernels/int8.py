"""Products of int8 values with a scale per row of each, written once in the type of the model.

The vendor's int8 product writes int32, which must be read again to be scaled: four times the bytes of a bf16
result, twice. Here the scales and the bias are applied before the write.

    y[n, o] = scale[n] * weight_scale[o] * sum_i q[n, i] * weight[o, i] + bias[o]

Shapes: N tokens, I inputs, O outputs. The reference is `rows.scaled_linear_reference`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from . import triton_is_installed
from .launch import Launcher

if triton_is_installed():
    import triton
    import triton.language as tl


# 2. Triton

if triton_is_installed():

    @triton.jit(do_not_specialize=["num_rows"])
    def _int8_kernel(  # type: ignore[no-untyped-def]
        q_ptr,
        scale_ptr,
        weight_ptr,
        weight_scale_ptr,
        bias_ptr,
        out_ptr,
        num_rows,
        INPUTS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        OUT_STRIDE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        GROUP: tl.constexpr,  # rows of tiles that share a weight tile in the cache
    ):
        tiles_down = tl.cdiv(num_rows, ROWS)
        tiles_across: tl.constexpr = (OUTPUTS + COLUMNS - 1) // COLUMNS
        program = tl.program_id(0)
        in_group = GROUP * tiles_across
        first = (program // in_group) * GROUP
        height = tl.minimum(tiles_down - first, GROUP)
        row = (first + (program % in_group) % height) * ROWS + tl.arange(0, ROWS)
        column = ((program % in_group) // height) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        has_row = row < num_rows
        has_column = column < OUTPUTS
        whole: tl.constexpr = INPUTS % DEPTH == 0 and OUTPUTS % COLUMNS == 0
        if whole:  # rows past the end repeat the last one: loads without masks, results not written
            row = tl.minimum(row, num_rows - 1)
        q = q_ptr + row[:, None].to(tl.int64) * INPUTS + depth[None, :]
        weight = weight_ptr + column[None, :].to(tl.int64) * INPUTS + depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for start in range(0, INPUTS, DEPTH):
            if whole:
                a = tl.load(q)
                b = tl.load(weight)
            else:
                has_depth = depth < INPUTS - start
                a = tl.load(q, mask=has_row[:, None] & has_depth[None, :], other=0)
                b = tl.load(weight, mask=has_column[None, :] & has_depth[:, None], other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
            q += DEPTH
            weight += DEPTH
        scale = tl.load(scale_ptr + row, mask=has_row, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + column, mask=has_column, other=0.0)
        y = total.to(tl.float32) * scale[:, None] * weight_scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
        to = out_ptr + row[:, None].to(tl.int64) * OUT_STRIDE + column[None, :]
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])

    _run = Launcher(_int8_kernel)


# 3. Public


def int8_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The linear layer [N, O] of int8 `values` [N, I], written into `out` (rows of any stride) if given.

    `scale` [N, 1] and `weight_scale` [O, 1] are fp32. Triton only; see `quantized.scaled_linear`.
    """
    num_rows, inputs = values.shape
    outputs = weight.shape[0]
    if out is None or out.stride(1) != 1:
        y = torch.empty((num_rows, outputs), dtype=dtype, device=values.device)
    else:
        y = out
    if num_rows:
        rows, columns, depth, warps, stages = _tile(num_rows, values.device)
        tiles = -(-num_rows // rows) * -(-outputs // columns)
        tensors = (values, scale, weight, weight_scale, weight_scale if bias is None else bias, y)
        constants = (inputs, outputs, y.stride(0), bias is not None, rows, columns, depth, 8)
        _run((tiles, 1, 1), tensors, (num_rows,), constants, warps, num_stages=stages)
    return y if out is None or y is out else out.copy_(y)


def _tile(num_rows: int, device: torch.device) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a program's tile, its warps, and the stages in which it loads.

    The large one takes 144 KiB of shared memory, which the GPUs for data centres have.
    """
    if num_rows <= 64:
        return 32, 64, 64, 4, 3
    if num_rows >= MANY_ROWS and device.type == "cuda" and _has_large_memory(device):
        return 128, 256, 128, 8, 3
    return 128, 128, 64, 8, 3


MANY_ROWS = 1024


@lru_cache(maxsize=16)
def _has_large_memory(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
