"""What `norm.py` computes, in plain torch: the values in fp32 inside, and their gradients.

Shapes as there: N tokens, D width, M modulations; x and y [..., D], gate, scale and shift [M, D], `index` [N]
or None.
"""

import torch
from torch import Tensor

EPSILON = 1e-6


def norm_modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None, eps: float = EPSILON
) -> Tensor:
    """h, for x' = x."""
    wide = x.float()
    normalised = torch.nn.functional.layer_norm(wide, wide.shape[-1:], eps=eps)
    h = normalised * (1 + per_token(scale, x, index)) + per_token(shift, x, index)
    return h.to(x.dtype)


def gate_add_reference(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """x'."""
    return (x.float() + per_token(gate, x, index) * y.float()).to(x.dtype)


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


def norm_gradients(
    x: Tensor, scale: Tensor, index: Tensor | None, eps: float, grad_h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (fp32), scale and shift, for those of h."""
    wide, grad_h = x.float(), grad_h.float()
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + eps)
    normalised = (wide - mean) * inverse
    grad = grad_h * (1 + per_token(scale, x, index))
    along = (grad * normalised).mean(-1, keepdim=True)
    grad_x = inverse * (grad - grad.mean(-1, keepdim=True) - normalised * along)
    return grad_x, sum_tokens(grad_h * normalised, scale, index), sum_tokens(grad_h, scale, index)


def sum_tokens(gradient: Tensor, like_MD: Tensor, index: Tensor | None) -> Tensor:
    """Sum over the tokens that share a modulation, [M, D]."""
    flat = gradient.flatten(0, -2)
    if index is None:
        return flat.sum(0, keepdim=True).to(like_MD.dtype)
    total = flat.new_zeros(like_MD.shape).index_add(0, index.long(), flat)
    return total.to(like_MD.dtype)


def per_token(parameter_MD: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """The modulation as fp32 that broadcasts over the tokens of `x`."""
    rows = parameter_MD.float()
    return rows if index is None else rows[index.long()].view(x.shape)
