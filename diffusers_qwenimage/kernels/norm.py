"""Gate, residual, LayerNorm and modulation in one pass over the tokens (adaLN-Zero, arXiv 2212.09748).

    x' = x + gate * y                                   rounded to the type of x
    h  = (x' - mean(x')) / sqrt(var(x') + eps) * (1 + scale) + shift

in fp32 inside, so that only x' and h are rounded, where separate operations round six times.

Shapes: N tokens, D width, M modulations. x and y are [..., D] with N tokens in all; gate, scale and shift are
[M, D], rows of any stride; `index` [N], int32, says which modulation a token has, and is None if M = 1.
"""

from typing import Any

import torch
from torch import Tensor

from . import backend, triton_is_installed

if triton_is_installed():
    import triton
    import triton.language as tl

EPSILON = 1e-6


# 1. Reference


def norm_modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None, eps: float = EPSILON
) -> Tensor:
    """h, for x' = x."""
    wide = x.float()
    normalised = torch.nn.functional.layer_norm(wide, wide.shape[-1:], eps=eps)
    h = normalised * (1 + _per_token(scale, x, index)) + _per_token(shift, x, index)
    return h.to(x.dtype)


def gate_add_reference(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """x'."""
    return (x.float() + _per_token(gate, x, index) * y.float()).to(x.dtype)


def gate_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    index: Tensor | None = None,
    eps: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """x' and h."""
    total = gate_add_reference(x, y, gate, index)
    return total, norm_modulate_reference(total, scale, shift, index, eps)


def _per_token(parameter_MD: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """The modulation as fp32 that broadcasts over the tokens of `x`."""
    rows = parameter_MD.float()
    return rows if index is None else rows[index.long()].view(x.shape)


# 2. Triton

if triton_is_installed():

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        y_ptr,
        gate_ptr,
        scale_ptr,
        shift_ptr,
        index_ptr,
        total_ptr,
        h_ptr,
        gate_stride,
        scale_stride,
        shift_stride,
        eps,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        HAS_GATE: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_INDEX: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        which = token * 0
        if HAS_INDEX:
            which = tl.load(index_ptr + token).to(tl.int64)
        x = tl.load(x_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            y = tl.load(y_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + which * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
            total = (x + gate * y).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + token * D + column, total, mask=inside)
            x = total.to(tl.float32)
        if HAS_NORM:
            mean = tl.sum(x, 0) / D
            centred = tl.where(inside, x - mean, 0.0)
            inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
            scale = tl.load(scale_ptr + which * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + which * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
            h = centred * inverse * (1.0 + scale) + shift
            tl.store(h_ptr + token * D + column, h.to(h_ptr.dtype.element_ty), mask=inside)


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
    width = x.shape[-1]
    x = x.contiguous()
    y = x if y is None else y.contiguous()
    gate, scale, shift = (None if p is None else _rows(p) for p in (gate, scale, shift))
    some = scale if gate is None else gate
    assert some is not None
    total = x if gate is None else torch.empty_like(x)
    h = x if scale is None else torch.empty_like(x)
    num_tokens = x.numel() // width
    if num_tokens == 0:
        return total, h
    block = triton.next_power_of_2(width)
    gate_rows, scale_rows, shift_rows = (some if p is None else p for p in (gate, scale, shift))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _kernel[(num_tokens,)](
            x,
            y,
            gate_rows,
            scale_rows,
            shift_rows,
            x if index is None else index,
            total,
            h,
            gate_rows.stride(0),
            scale_rows.stride(0),
            shift_rows.stride(0),
            eps,
            D=width,
            BLOCK=block,
            HAS_GATE=gate is not None,
            HAS_NORM=scale is not None,
            HAS_INDEX=index is not None,
            num_warps=min(max(block // 512, 1), 16),
        )
    return total, h


def _rows(parameter_MD: Tensor) -> Tensor:
    return parameter_MD if parameter_MD.stride(-1) == 1 else parameter_MD.contiguous()


# 3. Public


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
    grad_x, grad_scale, grad_shift = _norm_gradients(x, scale, index, ctx.eps, grad_h)
    return grad_x.to(x.dtype), grad_scale, grad_shift, None, None


def _gate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, scale, _, index, eps = inputs
    ctx.save_for_backward(y, gate, scale, index, output[0])
    ctx.eps = eps


def _gate_backward(ctx: Any, grad_total: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, scale, index, total = ctx.saved_tensors
    grad, grad_scale, grad_shift = _norm_gradients(total, scale, index, ctx.eps, grad_h)
    grad = grad + grad_total.float()
    grad_y = (grad * _per_token(gate, y, index)).to(y.dtype)
    grad_gate = _sum_tokens(grad * y.float(), gate, index)
    return grad.to(total.dtype), grad_y, grad_gate, grad_scale, grad_shift, None, None


def _norm_gradients(
    x: Tensor, scale: Tensor, index: Tensor | None, eps: float, grad_h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (fp32), scale and shift, for those of h."""
    wide, grad_h = x.float(), grad_h.float()
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    normalised = (wide - mean) * inverse
    grad = grad_h * (1 + _per_token(scale, x, index))
    along = (grad * normalised).mean(-1, keepdim=True)
    grad_x = inverse * (grad - grad.mean(-1, keepdim=True) - normalised * along)
    return grad_x, _sum_tokens(grad_h * normalised, scale, index), _sum_tokens(grad_h, scale, index)


def _sum_tokens(gradient: Tensor, like_MD: Tensor, index: Tensor | None) -> Tensor:
    """Sum over the tokens that share a modulation, [M, D]."""
    flat = gradient.flatten(0, -2)
    if index is None:
        return flat.sum(0, keepdim=True).to(like_MD.dtype)
    total = flat.new_zeros(like_MD.shape).index_add(0, index.long(), flat)
    return total.to(like_MD.dtype)


_norm_modulate.register_autograd(_norm_backward, setup_context=_norm_setup)
_gate_norm_modulate.register_autograd(_gate_backward, setup_context=_gate_setup)
