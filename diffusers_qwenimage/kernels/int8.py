"""Products of int8 values with a scale per row of each, written once in the type of the model.

The vendor's int8 product writes int32, which must be read again to be scaled: four times the bytes of a bf16
result, twice. Here the scales and the bias are applied before the write.

    y[n, o] = scale[n] * weight_scale[o] * sum_i q[n, i] * weight[o, i] + bias[o]

Shapes: N tokens, I inputs, O outputs. The reference is `rows.scaled_linear_reference`.
"""

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
        q = q_ptr + row[:, None].to(tl.int64) * INPUTS + depth[None, :]
        weight = weight_ptr + column[None, :].to(tl.int64) * INPUTS + depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
        for start in range(0, INPUTS, DEPTH):
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
        rows, columns = (128, 128) if num_rows > 64 else (32, 64)
        tiles = -(-num_rows // rows) * -(-outputs // columns)
        tensors = (values, scale, weight, weight_scale, weight_scale if bias is None else bias, y)
        constants = (inputs, outputs, y.stride(0), bias is not None, rows, columns, 64, 8)
        _run((tiles, 1, 1), tensors, (num_rows,), constants, 8 if rows == 128 else 4)
    return y if out is None or y is out else out.copy_(y)
