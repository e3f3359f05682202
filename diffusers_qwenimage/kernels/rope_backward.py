"""RMSNorm of queries and keys and rotary positions, out of place, and their gradients (see rope.py).

For training, queries and keys before the norm are kept: the turned ones go into a buffer of their own. With
x before the norm, n = x / sqrt(mean(x^2) + eps), weight w, a turn R by the angles, and the gradient G of
R(n w):

    s  = w R^-1(G)        dx = (s - n mean(s n)) / sqrt(mean(x^2) + eps)

The weights of the norms are frozen here.

Shapes: N tokens that lie one after the other, H heads. Row n of the tokens has row n of the table.
"""

import torch
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher, power_of_2
from .rope import EPSILON, _one, _turn

if triton_is_installed():
    import triton
    import triton.language as tl


# 1. Reference


def norm_rotate_to_reference(
    out: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    eps: float = EPSILON,
) -> None:
    """`norm_rotate_to` in plain torch."""
    out[:, 0] = _one(qkv[:, 0], query_weight, table, eps)
    out[:, 1] = _one(qkv[:, 1], key_weight, table, eps)


def norm_rotate_backward_reference(
    out: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    eps: float = EPSILON,
) -> None:
    """`norm_rotate_backward` in plain torch."""
    for part, weight in enumerate((query_weight, key_weight)):
        wide = qkv[:, part].float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normalised = wide * inverse
        gradient = _turn(gradients[part].float(), table, back=True) * weight.float()
        along = (gradient * normalised).mean(-1, keepdim=True)
        out[:, part] = (inverse * (gradient - normalised * along)).to(out.dtype)
    out[:, 2] = gradients[2]


# 2. Triton

if triton_is_installed():

    @triton.jit(do_not_specialize=["eps"])
    def _forward_kernel(  # type: ignore[no-untyped-def]
        out_ptr,
        qkv_ptr,
        query_weight_ptr,
        key_weight_ptr,
        table_ptr,
        eps,
        H: tl.constexpr,
        DIM: tl.constexpr,
        HEADS: tl.constexpr,  # heads per program, a power of two
        BLOCK: tl.constexpr,  # DIM rounded up to a power of two
    ):
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        part = tl.program_id(2)  # 0 queries, 1 keys
        dim = tl.arange(0, BLOCK)
        inside = (head < H)[:, None] & (dim < DIM)[None, :]
        offsets = part * H * DIM + head[:, None] * DIM + dim[None, :]
        weight_ptr = query_weight_ptr
        if part == 1:
            weight_ptr = key_weight_ptr
        weight = tl.load(weight_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
        kind = out_ptr.dtype.element_ty
        x = tl.load(qkv_ptr + token * (3 * H * DIM) + offsets, mask=inside, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps)
        x = (x * inverse[:, None]).to(kind).to(tl.float32) * weight[None, :]
        x = x.to(kind).to(tl.float32)
        angle = tl.load(table_ptr + token * DIM + dim, mask=dim < DIM, other=0.0)
        cosine, sine = tl.split(tl.reshape(angle, (BLOCK // 2, 2)))
        even, odd = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
        cosine = cosine[None, :]
        sine = sine[None, :]
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        to = out_ptr + token * (2 * H * DIM) + offsets
        tl.store(to, tl.reshape(turned, (HEADS, BLOCK)).to(kind), mask=inside)

    @triton.jit(
        do_not_specialize=[
            *("query_token", "query_head", "key_token", "key_head", "value_token", "value_head", "eps")
        ]
    )
    def _backward_kernel(  # type: ignore[no-untyped-def]
        out_ptr,
        qkv_ptr,
        query_weight_ptr,
        key_weight_ptr,
        table_ptr,
        query_ptr,
        key_ptr,
        value_ptr,
        query_token,
        query_head,
        key_token,
        key_head,
        value_token,
        value_head,
        eps,
        H: tl.constexpr,
        DIM: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        part = tl.program_id(2)  # 0 queries, 1 keys, 2 values
        dim = tl.arange(0, BLOCK)
        inside = (head < H)[:, None] & (dim < DIM)[None, :]
        offsets = token * (3 * H * DIM) + part * H * DIM + head[:, None] * DIM + dim[None, :]
        grad_ptr = query_ptr
        token_stride = query_token
        head_stride = query_head
        weight_ptr = query_weight_ptr
        if part == 1:
            grad_ptr = key_ptr
            token_stride = key_token
            head_stride = key_head
            weight_ptr = key_weight_ptr
        if part == 2:
            grad_ptr = value_ptr
            token_stride = value_token
            head_stride = value_head
        at = grad_ptr + token * token_stride + head[:, None] * head_stride + dim[None, :]
        grad = tl.load(at, mask=inside, other=0.0)
        if part == 2:
            tl.store(out_ptr + offsets, grad, mask=inside)
        else:
            weight = tl.load(weight_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
            x = tl.load(qkv_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps))[:, None]
            normalised = x * inverse
            angle = tl.load(table_ptr + token * DIM + dim, mask=dim < DIM, other=0.0)
            cosine, sine = tl.split(tl.reshape(angle, (BLOCK // 2, 2)))
            even, odd = tl.split(tl.reshape(grad.to(tl.float32), (HEADS, BLOCK // 2, 2)))
            cosine = cosine[None, :]
            sine = sine[None, :]
            back = tl.join(even * cosine + odd * sine, odd * cosine - even * sine)
            slope = tl.reshape(back, (HEADS, BLOCK)) * weight[None, :]
            along = (tl.sum(slope * normalised, 1) / DIM)[:, None]
            result = inverse * (slope - normalised * along)
            tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=inside)

    _run_forward, _run_backward = Launcher(_forward_kernel), Launcher(_backward_kernel)


def _grid(qkv: Tensor, parts: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """Programs, and the constants of both kernels."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    block = power_of_2(head_dim)
    heads = min(power_of_2(num_heads), max(1024 // block, 1))
    return (num_tokens, -(-num_heads // heads), parts), (num_heads, head_dim, heads, block)


# 3. Public


def norm_rotate_to(
    out: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    eps: float = EPSILON,
) -> None:
    """Write the normalised and turned queries and keys of `qkv` into `out`. No gradients of its own.

    Args:
        out: [N, 2, H, head_dim], contiguous.
        qkv: [N, 3, H, head_dim], contiguous.
        query_weight, key_weight: of the norms, [head_dim].
        table: cosine and sine, [N, head_dim / 2, 2], fp32, contiguous.
        eps: of the norms.
    """
    if backend(qkv.device).name != "triton" or qkv.shape[0] == 0:
        norm_rotate_to_reference(out, qkv, query_weight, key_weight, table, eps)
        return
    grid, constants = _grid(qkv, 2)
    _run_forward(grid, (out, qkv, query_weight, key_weight, table), (eps,), constants, 4)


def norm_rotate_backward(
    out: Tensor,
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    eps: float = EPSILON,
) -> None:
    """Write the gradients of queries, keys and values before norm and turn into `out`.

    Args:
        out: [N, 3, H, head_dim], contiguous.
        qkv: as given to `norm_rotate_to`.
        query_weight, key_weight, table, eps: as there.
        gradients: of the turned queries, the turned keys, and the values: [N, H, head_dim], any strides.
    """
    if backend(qkv.device).name != "triton" or qkv.shape[0] == 0:
        norm_rotate_backward_reference(out, qkv, query_weight, key_weight, table, gradients, eps)
        return
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in gradients]
    strides = [stride for part in parts for stride in part.stride()[:2]]
    grid, constants = _grid(qkv, 3)
    tensors = (out, qkv, query_weight, key_weight, table, *parts)
    _run_backward(grid, tensors, (*strides, eps), constants, 4)
