"""Values in 8 bits with scales: rows of activations, rows of weights, and the products of the two.

A row x of I values becomes q = x / scale in float8_e4m3fn or int8, where scale = max|x| / limit. Activations
have a scale per token, weights one per output channel, and a linear layer is

    y[n, o] = scale[n] * weight_scale[o] * sum_i q[n, i] * weight[o, i] + bias[o].

Rotation: int8 has one step for a whole row, so a single large value costs the others their precision. Blocks
of a power of four of inputs are multiplied by a Hadamard matrix, activations at run time and weights once:
the sum over i stays the same, and large values are spread (arXiv 2404.00456). The matrix is the Kronecker
power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2, as in ComfyUI's int8 files
("convrot"): no column of it is constant, so that a common offset of the inputs is spread too. fp8 is a
floating type whose error follows each value, and needs no rotation (benchmarks/quantization.py).

This is the plain-torch reference, which needs no Triton; quantized.py has the kernels.

Shapes: N tokens, I inputs, O outputs; weight [O, I], scales fp32 [N, 1] and [O, 1].
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

FP8 = torch.float8_e4m3fn
LIMITS = {FP8: 448.0, torch.int8: 127.0}
SMALLEST = 1e-12  # of a row's largest value: rows of zeros divide by it


class Target(NamedTuple):
    """How activations are quantised: the type, and the size of rotated blocks (0: none)."""

    dtype: torch.dtype
    rotation: int = 0


class Rows(NamedTuple):
    """Quantised rows.

    Attributes:
        values: q [N, I]
        scale: [N, 1], fp32
    """

    values: Tensor
    scale: Tensor


def quantize_rows_reference(x: Tensor, target: Target) -> Rows:
    """The rows of x [N, I], rotated and quantised."""
    wide = rotate_blocks(x.float(), target.rotation)
    limit = LIMITS[target.dtype]
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / limit
    scaled = wide / scale
    if target.dtype == torch.int8:
        scaled = (scaled + 0.5).floor()
    return Rows(scaled.clamp(-limit, limit).to(target.dtype), scale)


def gelu_quantize_reference(x: Tensor, target: Target) -> Rows:
    """The same of GELU(x), tanh approximation."""
    return quantize_rows_reference(gelu(x.float(), approximate="tanh"), target)


def dequantize_reference(weight: Tensor, scale: Tensor, dtype: torch.dtype, rotation: int = 0) -> Tensor:
    """What the rows stand for, [O, I] in `dtype`."""
    return rotate_blocks(weight.float() * scale, rotation).to(dtype)


def scaled_linear_reference(
    rows: Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [N, O] in `dtype`."""
    q, scale = rows
    if q.dtype == torch.int8:
        sums = _integer_product(q, weight).float()
    else:
        sums = q.float() @ weight.float().t()
    y = sums * scale * weight_scale.t()
    return (y if bias is None else y + bias.float()).to(dtype)


def rotate_blocks(x: Tensor, block: int) -> Tensor:
    """x [..., I] with every block of so many values multiplied by `hadamard`, which is its own inverse.

    Raises:
        ValueError: if I is no multiple of the block, or that is no power of four.
    """
    if block in (0, 1):
        return x
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} values cannot be rotated in blocks of {block}.")
    matrix = hadamard(block, x.device).to(x.dtype)
    rotated: Tensor = x.unflatten(-1, (-1, block)) @ matrix
    return rotated.flatten(-2)


def hadamard(size: int, device: torch.device) -> Tensor:
    """The matrix of the rotation, symmetric and orthogonal: [size, size], fp32; a power of four."""
    return _hadamard(size).to(device)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> Tensor:
    with torch.inference_mode(False):
        four = 0.5 - torch.eye(4).flip(0)
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < size:
            matrix = torch.kron(matrix, four)
        if matrix.shape[0] != size:
            raise ValueError(f"Blocks of {size} cannot be rotated; their size must be a power of four.")
        return matrix


def _integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """q @ weight.t() in int32, exact."""
    if q.shape[0] == 0:
        return q.new_zeros(0, weight.shape[0], dtype=torch.int32)
    has_product = q.device.type in ("cpu", "cuda") and hasattr(torch, "_int_mm")  # private: it may go
    if has_product and not (q.shape[1] % 8 or weight.shape[0] % 8):
        rows = q.shape[0]
        padding = max(32 - rows, 0) if q.device.type == "cuda" else 0  # the library wants more than 16 rows
        padded = torch.nn.functional.pad(q, (0, 0, 0, padding)) if padding else q
        return torch._int_mm(padded, weight.t())[:rows]
    total = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], _EXACT_IN_FP32):
        part = slice(start, start + _EXACT_IN_FP32)
        total += (q[:, part].float() @ weight[:, part].float().t()).to(torch.int32)
    return total


_EXACT_IN_FP32 = 1024  # products of int8 whose sum is below 2^24


def has_fp8_products(device: torch.device) -> bool:
    """Whether products of fp8 values are computed as such there; a CPU computes them in fp32.

    Elsewhere, and without torch's private operation for them, weights of fp8 are multiplied out.
    """
    if device.type == "cuda" and torch.version.hip is None:
        return _capability(device) >= (8, 9) and hasattr(torch, "_scaled_mm")
    return device.type == "cpu"


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
