"""Gradients of gate, residual, LayerNorm and modulation (norm.py) in one pass over the tokens of a sample.

With x' = x + gate * y, n = (x' - mean) / sqrt(var + eps), h = n (1 + scale) + shift, and the gradients G of
x' and g of h:

    dx'    = G + (s - mean(s) - n mean(s n)) / sqrt(var + eps),   s = g (1 + scale);   dx = dx'
    dy     = dx' * gate
    dgate  = sum(dx' * y)     dscale = sum(g * n)     dshift = sum(g)        over the tokens, in fp32

The sums over tokens are kept in registers while a program walks over its tokens, so that the gradients of the
modulation cost no pass of their own. There are as many programs as the device runs at a time.

Shapes: N tokens of one sample, D width; x', y, G, g are [N, D]; gate, scale and shift are [D].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher, num_processors, power_of_2
from .norm_reference import EPSILON

if triton_is_installed():
    import triton
    import triton.language as tl

_LEAST_ROWS = 4  # tokens of a program: fewer would make the sums dear


@dataclass(frozen=True, kw_only=True)
class NormGradients:
    """Gradients of one sample; those of the modulation are fp32, [D].

    Attributes:
        x: [N, D]
        y: [N, D], None without a gate.
        gate, scale, shift: None where the operation has none.
    """

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


# 1. Reference


def gate_norm_backward_reference(
    total: Tensor,
    scale: Tensor | None,
    grad_total: Tensor | None,
    grad_h: Tensor | None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = EPSILON,
) -> NormGradients:
    """`gate_norm_backward` in plain torch."""
    wide = total.float()
    grad = torch.zeros_like(wide) if grad_total is None else grad_total.float()
    grad_scale = grad_shift = grad_y = grad_gate = None
    if scale is not None:
        assert grad_h is not None
        grad_h = grad_h.float()
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        inverse = torch.rsqrt(variance + eps)
        normalised = (wide - mean) * inverse
        slope = grad_h * (1 + scale.float())
        along = (slope * normalised).mean(-1, keepdim=True)
        grad = grad + inverse * (slope - slope.mean(-1, keepdim=True) - normalised * along)
        grad_scale, grad_shift = (grad_h * normalised).sum(0), grad_h.sum(0)
    if y is not None:
        assert gate is not None
        grad_y = (grad * gate.float()).to(total.dtype)
        grad_gate = (grad * y.float()).sum(0)
    return NormGradients(x=grad.to(total.dtype), y=grad_y, gate=grad_gate, scale=grad_scale, shift=grad_shift)


# 2. Triton

if triton_is_installed():

    @triton.jit
    def _row(ptr, column, there, WANTED: tl.constexpr):  # type: ignore[no-untyped-def]
        value = tl.zeros(column.shape, ptr.dtype.element_ty)
        if WANTED:
            value = tl.load(ptr + column, mask=there, other=0.0)
        return value

    @triton.jit(do_not_specialize=["num_tokens", "num_rows", "eps"])
    def _kernel(  # type: ignore[no-untyped-def]
        total_ptr,
        y_ptr,
        gate_ptr,
        scale_ptr,
        grad_total_ptr,
        grad_h_ptr,
        grad_x_ptr,
        grad_y_ptr,
        sums_ptr,
        num_tokens,
        num_rows,
        eps,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        HAS_GATE: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_TOTAL: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        zero = tl.zeros((BLOCK,), tl.float32)
        gate = zero
        slope = zero
        if HAS_GATE:
            gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            slope = 1.0 + tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
        sum_gate = zero
        sum_scale = zero
        sum_shift = zero
        token = program * num_rows
        end = tl.minimum(token + num_rows, num_tokens)
        # Of every token, what the next one needs is on its way while this one is computed.
        there = column < tl.where(token < end, D, 0)  # "&" of block and scalar fails in Triton 3.9
        at = token * D
        next_x = _row(total_ptr + at, column, there, HAS_NORM)
        next_h = _row(grad_h_ptr + at, column, there, HAS_NORM)
        next_y = _row(y_ptr + at, column, there, HAS_GATE)
        next_total = _row(grad_total_ptr + at, column, there, HAS_TOTAL)
        for _ in range(num_rows):
            here = there
            to = at
            x = next_x.to(tl.float32)
            y = next_y.to(tl.float32)
            grad = next_total.to(tl.float32)
            grad_h = next_h.to(tl.float32)
            token += 1
            there = column < tl.where(token < end, D, 0)
            at = token * D
            next_x = _row(total_ptr + at, column, there, HAS_NORM)
            next_h = _row(grad_h_ptr + at, column, there, HAS_NORM)
            next_y = _row(y_ptr + at, column, there, HAS_GATE)
            next_total = _row(grad_total_ptr + at, column, there, HAS_TOTAL)
            if HAS_NORM:
                centred = tl.where(here, x - tl.sum(x, 0) / D, 0.0)
                inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
                normalised = centred * inverse
                sum_scale += grad_h * normalised
                sum_shift += grad_h
                grad_n = grad_h * slope
                along = tl.sum(grad_n * normalised, 0) / D
                grad += inverse * (grad_n - tl.sum(grad_n, 0) / D - normalised * along)
                tl.store(grad_x_ptr + to + column, grad.to(grad_x_ptr.dtype.element_ty), mask=here)
            if HAS_GATE:
                sum_gate += grad * y
                tl.store(grad_y_ptr + to + column, (grad * gate).to(grad_y_ptr.dtype.element_ty), mask=here)
        sums = sums_ptr + column
        if HAS_NORM:
            sums += program * (2 + HAS_GATE) * D
            tl.store(sums, sum_scale, mask=inside)
            tl.store(sums + D, sum_shift, mask=inside)
            sums += 2 * D
        else:
            sums += program * D
        if HAS_GATE:
            tl.store(sums, sum_gate, mask=inside)

    _run = Launcher(_kernel)


def _launch(
    total: Tensor,
    scale: Tensor | None,
    grad_total: Tensor | None,
    grad_h: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> NormGradients:
    num_tokens, width = total.shape
    grad_x = grad_total if scale is None else torch.empty_like(total)
    grad_y = None if y is None else torch.empty_like(total)
    assert grad_x is not None
    most = num_processors(total.device) * (2 if scale is None else 1)  # what fits on the device at a time
    block, rows = power_of_2(width), max(-(-num_tokens // most), _LEAST_ROWS)
    programs = -(-num_tokens // rows)
    num_sums = 2 * (scale is not None) + (y is not None)
    sums = torch.empty(programs, num_sums, width, dtype=torch.float32, device=total.device)
    tensors = (
        total,
        total if y is None else y,
        total if gate is None else gate,
        total if scale is None else scale,
        total if grad_total is None else grad_total,
        total if grad_h is None else grad_h,
        grad_x,
        grad_x if grad_y is None else grad_y,
        sums,
    )
    constants = (width, block, y is not None, scale is not None, grad_total is not None)
    num_warps = min(max(block // 512, 1), 16)
    _run((programs, 1, 1), tensors, (num_tokens, rows, eps), constants, num_warps)
    found = list(sums.sum(0).unbind())
    return NormGradients(
        x=grad_x,
        y=grad_y,
        gate=None if y is None else found[-1],
        scale=None if scale is None else found[0],
        shift=None if scale is None else found[1],
    )


# 3. Public


def gate_norm_backward(
    total: Tensor,
    scale: Tensor | None,
    grad_total: Tensor | None,
    grad_h: Tensor | None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = EPSILON,
) -> NormGradients:
    """Gradients of `norm_modulate` (no gate), `gate_norm_modulate` and `gate_add` (no scale), of one sample.

    Args:
        total: x' [N, D], contiguous like all that follow.
        scale: [D], or None if nothing is normalised; then `grad_h` is None too.
        grad_total: of x' [N, D]; None is zero.
        grad_h: of h [N, D].
        y: what the gate multiplies, [N, D], or None.
        gate: [D].
        eps: of the norm.
    """
    if backend(total.device).name != "triton" or total.shape[0] == 0:
        return gate_norm_backward_reference(total, scale, grad_total, grad_h, y, gate, eps)
    grad_total = None if grad_total is None else grad_total.contiguous()
    return _launch(total, scale, grad_total, grad_h, y, gate, eps)
