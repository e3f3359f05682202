"""Quantising, dequantising and multiplying in 8 bits on a GPU; what is computed is in rows.py.

One pass over the tokens finds a row's scale and writes its 8 bits, after GELU if that comes before. Products
of fp8 are the vendor's (compute capability 8.9 and newer), those of int8 are in int8.py.

Shapes: N tokens, I inputs, O outputs; weight [O, I], scales fp32 [N, 1] and [O, 1].
"""

from functools import lru_cache

import torch
from torch import Tensor

from . import backend, triton_is_installed
from .int8 import int8_linear
from .launch import Launcher, power_of_2
from .rows import (
    FP8,
    LIMITS,
    Rows,
    Target,
    dequantize_reference,
    gelu_quantize_reference,
    has_fp8_products,
    quantize_rows_reference,
    scaled_linear_reference,
)

if triton_is_installed():
    import triton
    import triton.language as tl


# 2. Triton

if triton_is_installed():

    @triton.jit
    def _rotate_digit(x, BLOCK: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
        """Four values `STEP` apart become half their sum, less the one at the mirrored place."""
        fours = tl.permute(tl.reshape(x, (BLOCK // (4 * STEP), 2, 2, STEP)), (0, 3, 1, 2))
        even, odd = tl.split(fours)
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        half = 0.5 * (x0 + x1 + x2 + x3)
        turned = tl.join(tl.join(half - x3, half - x1), tl.join(half - x2, half - x0))
        return tl.reshape(tl.permute(turned, (0, 2, 3, 1)), (BLOCK,))

    @triton.jit
    def rotate_row(x, BLOCK: tl.constexpr, ROTATION: tl.constexpr):  # type: ignore[no-untyped-def]
        """x [BLOCK], fp32, with blocks of ROTATION (a power of four up to 256) values rotated."""
        if ROTATION >= 4:
            x = _rotate_digit(x, BLOCK, 1)
        if ROTATION >= 16:
            x = _rotate_digit(x, BLOCK, 4)
        if ROTATION >= 64:
            x = _rotate_digit(x, BLOCK, 16)
        if ROTATION >= 256:
            x = _rotate_digit(x, BLOCK, 64)
        return x

    @triton.jit
    def quantize_row(  # type: ignore[no-untyped-def]
        x, LIMIT: tl.constexpr, BLOCK: tl.constexpr, ROTATION: tl.constexpr
    ):
        """x [BLOCK], fp32, rotated and divided by its scale, still fp32; and the scale."""
        x = rotate_row(x, BLOCK, ROTATION)
        scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / LIMIT
        return in_steps(x, 1.0 / scale, LIMIT), scale

    @triton.jit
    def in_steps(x, inverse, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
        """x / scale, whole numbers for int8; the conversion to fp8 rounds and saturates."""
        x = x * inverse
        if LIMIT == 127:
            x = tl.minimum(tl.maximum(tl.floor(x + 0.5), -127.0), 127.0)
        return x

    @triton.jit
    def _part(  # type: ignore[no-untyped-def]
        x_ptr, column, D: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, ROTATION: tl.constexpr
    ):
        """A part of a row as it will be quantised, fp32."""
        x = tl.load(x_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        if GELU:  # x / (1 + exp(-2 y)) = x (1 + tanh(y)) / 2
            x = x / (1.0 + tl.exp(tl.minimum(x * (-1.5957691216057308 - 0.07135481282638786 * x * x), 80.0)))
        return rotate_row(x, BLOCK, ROTATION)

    @triton.jit
    def _quantize_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        q_ptr,
        scale_ptr,
        X_STRIDE: tl.constexpr,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        PARTS: tl.constexpr,  # of BLOCK columns; 1 or 3, since widths of this model are three powers of two
        GELU: tl.constexpr,
        LIMIT: tl.constexpr,
        ROTATION: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        x_ptr += token * X_STRIDE
        q_ptr += token * D
        kind: tl.constexpr = q_ptr.dtype.element_ty
        x0 = _part(x_ptr, column, D, BLOCK, GELU, ROTATION)
        largest = tl.max(tl.abs(x0), 0)
        if PARTS == 3:
            x1 = _part(x_ptr, column + BLOCK, D, BLOCK, GELU, ROTATION)
            x2 = _part(x_ptr, column + 2 * BLOCK, D, BLOCK, GELU, ROTATION)
            largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(x1), tl.abs(x2)), 0))
        scale = tl.maximum(largest, 1e-12) / LIMIT
        inverse = 1.0 / scale
        tl.store(q_ptr + column, in_steps(x0, inverse, LIMIT).to(kind), mask=column < D)
        if PARTS == 3:
            tl.store(q_ptr + column + BLOCK, in_steps(x1, inverse, LIMIT).to(kind))
            tl.store(q_ptr + column + 2 * BLOCK, in_steps(x2, inverse, LIMIT).to(kind))
        tl.store(scale_ptr + token, scale)

    @triton.jit
    def _dequantize_kernel(  # type: ignore[no-untyped-def]
        q_ptr, scale_ptr, out_ptr, D: tl.constexpr, BLOCK: tl.constexpr, ROTATION: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        x = tl.load(q_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        x = rotate_row(x * tl.load(scale_ptr + row), BLOCK, ROTATION)
        tl.store(out_ptr + row * D + column, x.to(out_ptr.dtype.element_ty), mask=inside)

    _run_quantize = Launcher(_quantize_kernel)
    _run_dequantize = Launcher(_dequantize_kernel)


def _launch_quantize(x: Tensor, target: Target, with_gelu: bool) -> Rows:
    num_tokens, width = x.shape
    stride = x.stride()
    if stride[1] != 1 or stride[0] % 8:
        x = x.contiguous()
        stride = x.stride()
    values = torch.empty((num_tokens, width), dtype=target.dtype, device=x.device)
    scale = torch.empty((num_tokens, 1), dtype=torch.float32, device=x.device)
    if num_tokens:
        constants, warps = _quantizing(stride[0], width, target, with_gelu)
        _run_quantize((num_tokens, 1, 1), (x, values, scale), (), constants, warps)
    return Rows(values, scale)


@lru_cache(maxsize=64)
def _quantizing(
    stride: int, width: int, target: Target, with_gelu: bool
) -> tuple[tuple[int | float | bool, ...], int]:
    """The kernel's constants, and its warps."""
    third = width // 3
    parts = 3 if width == 3 * third and power_of_2(third) == third >= max(target.rotation, 256) else 1
    block = third if parts == 3 else power_of_2(width)
    constants = (stride, width, block, parts, with_gelu, LIMITS[target.dtype], target.rotation)
    return constants, max(_num_warps(block * parts) // (2 if width <= 4096 else 1), 1)


def _num_warps(columns: int) -> int:
    return min(max(power_of_2(columns) // 512, 1), 16)


# 3. Public


def quantize_rows(x: Tensor, target: Target) -> Rows:
    """The rows of x [N, I], rotated and quantised. No gradients."""
    if _has_kernels(x.device, target.dtype):
        return _launch_quantize(x, target, False)
    return quantize_rows_reference(x, target)


def gelu_quantize(x: Tensor, target: Target) -> Rows:
    """The same of GELU(x), tanh approximation."""
    if _has_kernels(x.device, target.dtype):
        return _launch_quantize(x, target, True)
    return gelu_quantize_reference(x, target)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype, rotation: int = 0) -> Tensor:
    """What quantised rows [O, I] with scales [O, 1] stand for, in `dtype`."""
    if not _has_kernels(weight.device, weight.dtype) or not weight.is_contiguous():
        return dequantize_reference(weight, scale, dtype, rotation)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, width = weight.shape
    block = power_of_2(width)
    constants = (width, block, rotation)
    _run_dequantize((rows, 1, 1), (weight, scale, out), (), constants, _num_warps(block))
    return out


def scaled_linear(
    rows: Rows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The linear layer [N, O] of quantised rows, in `dtype`; written into `out` if given.

    Args:
        rows: N rows of I values.
        weight: [O, I] of the same type, contiguous.
        weight_scale: [O, 1], fp32.
        bias: [O]
        dtype: of the result.
        out: where to write it, rows of any stride.
    """
    if weight.is_cuda:
        if weight.dtype == FP8:
            return _fp8_product(rows, weight, weight_scale, bias, dtype, out)
        if backend(weight.device).name == "triton":
            return int8_linear(*rows, weight, weight_scale, bias, dtype, out)
    y = scaled_linear_reference(rows, weight, weight_scale, bias, dtype)
    return y if out is None else out.copy_(y)


def _fp8_product(
    rows: Rows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """The vendor's product: bf16 with a bf16 bias, then cast.

    Called hundreds of times per forward: what the library takes as it is goes there at once.
    """
    values, scale = rows
    num_rows = values.shape[0]
    if num_rows >= _FEWEST_ROWS and dtype == torch.bfloat16 and (out is None or out.is_contiguous()):
        y = out
        if y is None:
            y = torch.empty((num_rows, weight.shape[0]), dtype=dtype, device=weight.device)
        if _is_taken(y, values, weight, scale, weight_scale, bias):
            torch._scaled_mm(values, weight.t(), scale, weight_scale.t(), bias, None, dtype, True, out=y)
            return y
    return _mended_product(rows, weight, weight_scale, bias, dtype, out)


def _is_taken(y: Tensor, *inputs: Tensor | None) -> bool:
    """Whether no type has to be changed and no address to be moved."""
    bias = inputs[-1]
    if y.dtype != torch.bfloat16 or (bias is not None and bias.dtype != torch.bfloat16):
        return False
    addresses = y.data_ptr()
    for tensor in inputs:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % 16 == 0


def _mended_product(
    rows: Rows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    num_rows = rows.values.shape[0]
    if num_rows < _FEWEST_ROWS:
        rows = _with_more_rows(rows)
    if bias is not None:
        bias = _aligned(bias if bias.dtype == torch.bfloat16 else bias.to(torch.bfloat16))
    y = torch.empty((rows.values.shape[0], weight.shape[0]), dtype=torch.bfloat16, device=weight.device)
    torch._scaled_mm(
        _aligned(rows.values),
        _aligned(weight).t(),
        _aligned(rows.scale),
        _aligned(weight_scale).t(),
        bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=y,
    )
    y = y[:num_rows].to(dtype)
    return y if out is None else out.copy_(y)


# The vendor's library refuses addresses that are no multiples of 16 bytes; on an H100 it also refused 16 and
# 17 rows of 12288 inputs, and took 128.
_FEWEST_ROWS = 128


def _with_more_rows(rows: Rows) -> Rows:
    missing = _FEWEST_ROWS - rows.values.shape[0]
    values = torch.nn.functional.pad(rows.values.view(torch.int8), (0, 0, 0, missing)).view(rows.values.dtype)
    return Rows(values, torch.nn.functional.pad(rows.scale, (0, 0, 0, missing)))


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    if backend(device).name != "triton":
        return False
    return dtype != FP8 or has_fp8_products(device)
