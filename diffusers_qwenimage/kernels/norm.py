"""Gate, residual, LayerNorm and modulation in one pass over the tokens (adaLN-Zero, arXiv 2212.09748).

    x' = x + gate * y                                   rounded to the type of x
    h  = (x' - mean(x')) / sqrt(var(x') + eps) * (1 + scale) + shift

in fp32 inside, so that only x' and h are rounded, where separate operations round six times.

Shapes: N tokens, D width, M modulations. x and y are [..., D] with N tokens in all; gate, scale and shift are
[M, D], rows of any stride; `index` [N], int32, says which modulation a token has, and is None if M = 1.
The modulation of a block is the six of them side by side, [M, 6 D]: shift, scale, gate of attention, then of
the MLP. h can come in 8 bits, with a scale per token, for the product that follows (quantized.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher, Variant, num_processors, power_of_2
from .norm_reference import (
    EPSILON,
    gate_add_reference,
    gate_norm_modulate_reference,
    norm_gradients,
    norm_modulate_reference,
    per_token,
    sum_tokens,
)
from .rows import LIMITS, Rows, Target, quantize_rows_reference

if triton_is_installed():
    import triton
    import triton.language as tl

    from .quantized import quantize_row

# 1. Triton

if triton_is_installed():

    @triton.jit(do_not_specialize=["num_tokens", "eps"])
    def _norm_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        y_ptr,
        gate_ptr,
        scale_ptr,
        shift_ptr,
        index_ptr,
        total_ptr,
        h_ptr,
        row_scale_ptr,
        num_tokens,
        eps,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        STRIDE: tl.constexpr,  # elements between two rows of gate, scale and shift
        HAS_GATE: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_INDEX: tl.constexpr,
        LIMIT: tl.constexpr,  # largest value of 8 bits, 0 if h is not quantised
        ROTATION: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        inside = column < D
        first, programs = tl.program_id(0), tl.num_programs(0)
        if not HAS_INDEX:  # read once for all tokens of the program
            if HAS_GATE:
                gate = tl.load(gate_ptr + column, mask=inside, other=0.0)
            if HAS_NORM:
                scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
                shift = tl.load(shift_ptr + column, mask=inside, other=0.0)
        at = first.to(tl.int64) * D + column
        step = programs.to(tl.int64) * D
        x_next = tl.load(x_ptr + at, mask=inside, other=0.0)
        if HAS_GATE:
            y_next = tl.load(y_ptr + at, mask=inside, other=0.0)
        for token in range(first, num_tokens, programs):
            if HAS_INDEX:
                row = tl.load(index_ptr + token).to(tl.int64) * STRIDE + column
                if HAS_GATE:
                    gate = tl.load(gate_ptr + row, mask=inside, other=0.0)
                if HAS_NORM:
                    scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
                    shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
            # The next token is on its way while this one is computed.
            ahead = at + step
            # "&" of block and scalar fails in Triton 3.9.
            is_there = column < tl.where(token + programs < num_tokens, D, 0)
            x = x_next.to(tl.float32)
            x_next = tl.load(x_ptr + ahead, mask=is_there, other=0.0)
            if HAS_GATE:
                y = y_next.to(tl.float32)
                y_next = tl.load(y_ptr + ahead, mask=is_there, other=0.0)
                total = (x + gate.to(tl.float32) * y).to(total_ptr.dtype.element_ty)
                tl.store(total_ptr + at, total, mask=inside)
                x = total.to(tl.float32)
            if HAS_NORM:
                mean = tl.sum(x, 0) / D
                centred = tl.where(inside, x - mean, 0.0)
                inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
                h = centred * inverse * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
                if LIMIT == 0:
                    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
                else:
                    values, row_scale = quantize_row(h, LIMIT, BLOCK, ROTATION)
                    tl.store(h_ptr + at, values.to(h_ptr.dtype.element_ty), mask=inside)
                    tl.store(row_scale_ptr + token, row_scale)
            at = ahead

    _run = Launcher(_norm_kernel)


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; what is not asked for comes back as `x`."""
    some = gate if scale is None else scale
    assert some is not None
    rows = [some if part is None else part for part in (gate, scale, shift)]
    if len({row.stride() for row in rows}) > 1 or some.stride(-1) != 1:
        rows = [row.contiguous() for row in rows]
    total, h, _ = _launch_rows(
        x, y, rows, (0, 0, 0), rows[0].stride(0), index, eps, gate is not None, scale is not None, None
    )
    return total, h


def _launch_rows(
    x: Tensor,
    y: Tensor | None,
    rows: Sequence[Tensor],
    offsets: tuple[int, int, int],
    stride: int,
    index: Tensor | None,
    eps: float,
    has_gate: bool,
    has_norm: bool,
    target: Target | None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', h and the scales of its rows; what is not asked for comes back as `x`.

    `rows` are gate, scale and shift, each beginning `offsets` elements after its tensor's first. `in_place`
    writes x' over x, which must be contiguous.
    """
    width = x.shape[-1]
    if not x.is_contiguous():
        x = x.contiguous()
    if y is None:
        y = x
    elif not y.is_contiguous():
        y = y.contiguous()
    num_tokens = x.numel() // width
    total = torch.empty_like(x) if has_gate and not in_place else x
    h = row_scale = x
    if target is not None:
        h = torch.empty((num_tokens, width), dtype=target.dtype, device=x.device)
        row_scale = torch.empty((num_tokens, 1), dtype=torch.float32, device=x.device)
    elif has_norm:
        h = torch.empty_like(x)
    if num_tokens == 0:
        return total, h, row_scale
    block = power_of_2(width)
    limit, rotation = (0.0, 0) if target is None else (LIMITS[target.dtype], target.rotation)
    _run(
        (min(num_tokens, _PROGRAMS * num_processors(x.device)), 1, 1),
        (x, y, *rows, x if index is None else index, total, h, row_scale),
        (num_tokens, eps),
        (
            width,
            block,
            0 if index is None else stride,
            has_gate,
            has_norm,
            index is not None,
            limit,
            rotation,
        ),
        _num_warps(block),
        (0, 0, *offsets, 0, 0, 0, 0) if any(offsets) else None,
    )
    return total, h, row_scale


_PROGRAMS = 8  # per processor: each takes one token after the other


def _num_warps(block: int) -> int:
    """For 32 values per thread; whatever the number of tokens, so that sums are added in one order."""
    return min(max(block // 1024, 1), 16)


def variants(width: int, dtype: torch.dtype) -> list[Variant]:
    """What blocks of that width run where all tokens have one modulation and nothing is quantised."""
    block = power_of_2(width)
    return [
        Variant(
            launcher=_run,
            types=(dtype,) * 9,
            numbers=(1, EPSILON),
            constants=(width, block, 0, has_gate, has_norm, False, 0.0, 0),
            num_warps=_num_warps(block),
        )
        for has_gate, has_norm in ((False, True), (True, True), (True, False))
    ]


# 2. Public


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None, eps: float = EPSILON
) -> Tensor:
    """h [..., D], for x' = x."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        result: Tensor = _norm_modulate(x, scale, shift, index, eps)
        return result
    return _norm_modulate_now(x, scale, shift, index, eps)


def gate_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    index: Tensor | None = None,
    eps: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """x' and h, both [..., D]."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = _gate_norm_modulate(x, y, gate, scale, shift, index, eps)
        return result
    return _gate_norm_modulate_now(x, y, gate, scale, shift, index, eps)


def gate_add(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """x' [..., D]. Under a compiler, or with gradients, the reference: there it is nothing but additions."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or backend(x.device).name != "triton":
        return gate_add_reference(x, y, gate, index)
    return _launch(x, y, gate, None, None, index, 0.0)[0]


def attention_norm(
    x: Tensor, modulation: Tensor, index: Tensor | None, target: Target | None, triton: bool
) -> Tensor | Rows:
    """h [N, D] for the attention of a block, in the type of `x` or as `target` says. No gradients.

    Args:
        x: [..., D]
        modulation: [M, 6 D]
        index: which modulation a token has.
        target: how h is quantised.
        triton: whether the kernel runs, and not the reference.
    """
    width = x.shape[-1]
    if not triton:
        shift, scale = modulation[:, :width], modulation[:, width : 2 * width]
        return _quantized(norm_modulate_reference(x, scale, shift, index).view(-1, width), target)
    rows = (modulation, modulation, modulation)
    parts, stride = (0, width, 0), modulation.stride(0)
    _, h, scale = _launch_rows(x, None, rows, parts, stride, index, EPSILON, False, True, target)
    return h.view(-1, width) if target is None else Rows(h, scale)


def mlp_norm(
    x: Tensor, y: Tensor, modulation: Tensor, index: Tensor | None, target: Target | None, triton: bool
) -> tuple[Tensor, Tensor | Rows]:
    """x' after attention gave `y`, and h [N, D] for the MLP; arguments as in `attention_norm`."""
    width = x.shape[-1]
    if not triton:
        _, _, gate, shift, scale, _ = modulation.chunk(6, dim=-1)
        total, h = gate_norm_modulate_reference(x, y.view(x.shape), gate, scale, shift, index)
        return total, _quantized(h.view(-1, width), target)
    rows = (modulation, modulation, modulation)
    parts, stride = (2 * width, 4 * width, 3 * width), modulation.stride(0)
    total, h, scale = _launch_rows(x, y, rows, parts, stride, index, EPSILON, True, True, target)
    return total, h.view(-1, width) if target is None else Rows(h, scale)


def mlp_add(x: Tensor, y: Tensor, modulation: Tensor, index: Tensor | None, triton: bool) -> Tensor:
    """x' after the MLP gave `y`; arguments as in `attention_norm`."""
    width = x.shape[-1]
    if not triton:
        return gate_add_reference(x, y.view(x.shape), modulation[:, 5 * width :], index)
    rows = (modulation, modulation, modulation)
    parts, stride = (5 * width, 0, 0), modulation.stride(0)
    return _launch_rows(x, y, rows, parts, stride, index, EPSILON, True, False, None)[0]


def mlp_add_norm(
    x: Tensor,
    y: Tensor,
    modulation: Tensor,
    following: Tensor,
    index: Tensor | None,
    target: Target | None,
    triton: bool,
) -> tuple[Tensor, Tensor | Rows]:
    """`mlp_add`, and `attention_norm` of its result for the next block, whose modulation is `following`."""
    if not triton or following.stride() != modulation.stride():
        total = mlp_add(x, y, modulation, index, triton)
        return total, attention_norm(total, following, index, target, triton)
    width = x.shape[-1]
    rows = (modulation, following, following)
    parts, stride = (5 * width, width, 0), modulation.stride(0)
    total, h, scale = _launch_rows(x, y, rows, parts, stride, index, EPSILON, True, True, target)
    return total, h.view(-1, width) if target is None else Rows(h, scale)


def second_norm(
    x: Tensor, modulation: Tensor, index: Tensor | None, target: Target | None, triton: bool
) -> Tensor | Rows:
    """h [N, D] for the MLP of a block where `x` is x' already; arguments as in `attention_norm`."""
    width = x.shape[-1]
    if not triton:
        shift, scale = modulation[:, 3 * width : 4 * width], modulation[:, 4 * width : 5 * width]
        return _quantized(norm_modulate_reference(x, scale, shift, index).view(-1, width), target)
    rows = (modulation, modulation, modulation)
    parts, stride = (0, 4 * width, 3 * width), modulation.stride(0)
    _, h, row_scale = _launch_rows(x, None, rows, parts, stride, index, EPSILON, False, True, target)
    return h.view(-1, width) if target is None else Rows(h, row_scale)


def gate_add_(
    x: Tensor, y: Tensor, modulation: Tensor, index: Tensor | None, triton: bool, *, part: int
) -> None:
    """x' in the place of `x` [N, D], contiguous; `part`: which sixth of the modulation is the gate."""
    width = x.shape[-1]
    if not triton:
        x.copy_(gate_add_reference(x, y, modulation[:, part * width : (part + 1) * width], index))
        return
    rows = (modulation, modulation, modulation)
    parts, stride = (part * width, 0, 0), modulation.stride(0)
    _launch_rows(x, y, rows, parts, stride, index, EPSILON, True, False, None, in_place=True)


def _quantized(h: Tensor, target: Target | None) -> Tensor | Rows:
    return h if target is None else quantize_rows_reference(h, target)


def _norm_modulate_now(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None, eps: float) -> Tensor:
    if backend(x.device).name != "triton":
        return norm_modulate_reference(x, scale, shift, index, eps)
    return _launch(x, None, None, scale, shift, index, eps)[1]


def _gate_norm_modulate_now(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if backend(x.device).name != "triton":
        return gate_norm_modulate_reference(x, y, gate, scale, shift, index, eps)
    return _launch(x, y, gate, scale, shift, index, eps)


@torch.library.custom_op("diffusers_qwenimage::norm_modulate", mutates_args=())
def _norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None, eps: float) -> Tensor:
    return _norm_modulate_now(x, scale, shift, index, eps)


@_norm_modulate.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("diffusers_qwenimage::gate_norm_modulate", mutates_args=())
def _gate_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _gate_norm_modulate_now(x, y, gate, scale, shift, index, eps)


@_gate_norm_modulate.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, _, index, eps = inputs
    ctx.save_for_backward(x, scale, index)
    ctx.eps = eps


def _norm_backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, index = ctx.saved_tensors
    grad_x, grad_scale, grad_shift = norm_gradients(x, scale, index, ctx.eps, grad_h)
    return grad_x.to(x.dtype), grad_scale, grad_shift, None, None


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, scale, _, index, eps = inputs
    ctx.save_for_backward(y, gate, scale, index, output[0])
    ctx.eps = eps


def _gate_backward(ctx: Any, grad_total: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, scale, index, total = ctx.saved_tensors
    grad, grad_scale, grad_shift = norm_gradients(total, scale, index, ctx.eps, grad_h)
    grad = grad + grad_total.float()
    grad_y = (grad * per_token(gate, y, index)).to(y.dtype)
    grad_gate = sum_tokens(grad * y.float(), gate, index)
    return grad.to(total.dtype), grad_y, grad_gate, grad_scale, grad_shift, None, None


_norm_modulate.register_autograd(_norm_backward, setup_context=_norm_setup)
_gate_norm_modulate.register_autograd(_gate_backward, setup_context=_gate_setup)
