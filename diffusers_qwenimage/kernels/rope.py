"""RMSNorm of queries and keys (arXiv 1910.07467) and rotary positions (arXiv 2104.09864) in one pass.

A joint buffer holds queries, keys and values of all tokens that attend to each other, text and image, as the
matrix product wrote them: [S, 3, H, head_dim]. Queries and keys are normalised over a head and turned pair
by pair, in place; values stay. Rounded like separate operations: after norm, weight and turn.

Shapes: N tokens of one stream, S rows of the joint buffer, H heads, R rows of the rotary table. The row of a
token's queries, keys and values is `rows` [N], int32. Token n has row n % R of the table.
"""

from typing import Any

import torch
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher, Variant, power_of_2

if triton_is_installed():
    import triton
    import triton.language as tl

EPSILON = 1e-6
_WARPS = 2


# 1. Reference


def norm_rotate_reference(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, table: Tensor, eps: float = EPSILON
) -> Tensor:
    """Normalised and turned copy of `qkv` [N, 3, H, head_dim]; values as they are."""
    query, key, value = qkv.unbind(1)
    return torch.stack(
        [_one(query, query_weight, table, eps), _one(key, key_weight, table, eps), value], dim=1
    )


def norm_rotate_into_reference(
    joint: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    source: Tensor | None = None,
    eps: float = EPSILON,
) -> None:
    """`norm_rotate_into` in plain torch."""
    where = rows.long()
    qkv = joint[where] if source is None else source
    joint[where] = norm_rotate_reference(qkv, query_weight, key_weight, table, eps)


def _one(x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _turn((normalised * weight).to(x.dtype), table)


def _turn(x: Tensor, table: Tensor, *, back: bool = False) -> Tensor:
    """Turn the pairs of `x` [N, H, head_dim] by the angles of `table`, or back by them."""
    repeated = table.repeat(x.shape[0] // table.shape[0], 1, 1)[:, None]
    cosine, sine = repeated.unbind(-1)
    sine = -sine if back else sine
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


# 2. Triton

if triton_is_installed():

    @triton.jit(do_not_specialize=["table_rows", "eps"])
    def _rope_kernel(  # type: ignore[no-untyped-def]
        source_ptr,
        joint_ptr,
        rows_ptr,
        query_weight_ptr,
        key_weight_ptr,
        table_ptr,
        table_rows,
        eps,
        H: tl.constexpr,
        DIM: tl.constexpr,
        HEADS: tl.constexpr,  # per program, a power of two; keys' heads are counted on from the queries'
        BLOCK: tl.constexpr,  # DIM rounded up to a power of two
        FROM_SOURCE: tl.constexpr,  # then values are copied too
    ):
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        dim = tl.arange(0, BLOCK)
        is_dim = dim < DIM
        inside = (head < (3 if FROM_SOURCE else 2) * H)[:, None] & is_dim[None, :]
        offsets = head[:, None] * DIM + dim[None, :]
        row = tl.load(rows_ptr + token).to(tl.int64)
        to = joint_ptr + row * (3 * H * DIM) + offsets
        if FROM_SOURCE:
            loaded = tl.load(source_ptr + token * (3 * H * DIM) + offsets, mask=inside, other=0.0)
        else:
            loaded = tl.load(to, mask=inside, other=0.0)
        # One contiguous load, split in registers: loading pairs with stride 2 is 14 times slower.
        angle = tl.load(table_ptr + (token % table_rows) * DIM + dim, mask=is_dim, other=0.0)
        cosine, sine = tl.split(tl.reshape(angle, (1, BLOCK // 2, 2)))
        query_weight = tl.load(query_weight_ptr + dim, mask=is_dim, other=0.0).to(tl.float32)
        key_weight = tl.load(key_weight_ptr + dim, mask=is_dim, other=0.0).to(tl.float32)
        weight = tl.where((head < H)[:, None], query_weight[None, :], key_weight[None, :])
        kind = joint_ptr.dtype.element_ty
        x = loaded.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + eps)
        x = (x * inverse[:, None]).to(kind).to(tl.float32) * weight
        x = x.to(kind).to(tl.float32)
        even, odd = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
        turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        turned = tl.reshape(turned, (HEADS, BLOCK)).to(kind)
        if FROM_SOURCE:
            turned = tl.where((head < 2 * H)[:, None], turned, loaded)
        tl.store(to, turned, mask=inside)

    _run = Launcher(_rope_kernel)


def _launch(
    joint: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    source: Tensor | None,
    eps: float,
) -> None:
    num_tokens, (_, _, num_heads, head_dim) = rows.shape[0], joint.shape
    if num_tokens == 0:
        return
    block, heads = _tile(num_heads, head_dim)
    tensors = (
        joint if source is None else source.contiguous(),
        joint,
        rows,
        query_weight if query_weight.is_contiguous() else query_weight.contiguous(),
        key_weight if key_weight.is_contiguous() else key_weight.contiguous(),
        table if table.is_contiguous() else table.contiguous(),
    )
    all_heads = (2 if source is None else 3) * num_heads
    _run(
        (num_tokens, -(-all_heads // heads), 1),
        tensors,
        (table.shape[0], eps),
        (num_heads, head_dim, heads, block, source is not None),
        _WARPS,
    )


def _tile(num_heads: int, head_dim: int) -> tuple[int, int]:
    """Values of a head, rounded up, and heads of a program: at most 2048 values."""
    block = power_of_2(head_dim)
    return block, min(power_of_2(2 * num_heads), max(2048 // block, 1))


def variants(num_heads: int, head_dim: int, dtype: torch.dtype) -> list[Variant]:
    """What blocks run: in place, and from elsewhere."""
    block, heads = _tile(num_heads, head_dim)
    types = (dtype, dtype, torch.int32, dtype, dtype, torch.float32)
    return [
        Variant(
            launcher=_run,
            types=types,
            numbers=(1, EPSILON),
            constants=(num_heads, head_dim, heads, block, from_source),
            num_warps=_WARPS,
        )
        for from_source in (False, True)
    ]


# 3. Public


def norm_rotate_into(
    joint: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    source: Tensor | None = None,
    eps: float = EPSILON,
) -> None:
    """Normalise and turn the queries and keys of one stream, in the joint buffer. No gradients.

    Args:
        joint: [S, 3, H, head_dim], changed in the given rows.
        rows: [N], int32; no row twice.
        query_weight, key_weight: of the norms, [head_dim].
        table: cosine and sine, [R, head_dim / 2, 2], fp32; N is a multiple of R.
        source: where the stream's queries, keys and values are, [N, 3, H, head_dim], if not in `joint` yet;
            then the values are copied too.
        eps: of the norms.
    """
    if torch.compiler.is_compiling():
        _norm_rotate_into(joint, rows, query_weight, key_weight, table, source, eps)
    else:
        _norm_rotate_into_now(joint, rows, query_weight, key_weight, table, source, eps)


def norm_rotate(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, table: Tensor, eps: float = EPSILON
) -> Tensor:
    """The same out of place, with gradients: a copy of `qkv` [N, 3, H, head_dim]."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        result: Tensor = _norm_rotate(qkv, query_weight, key_weight, table, eps)
        return result
    return _norm_rotate_now(qkv, query_weight, key_weight, table, eps)


def _norm_rotate_into_now(
    joint: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    source: Tensor | None,
    eps: float,
) -> None:
    if backend(joint.device).name == "triton" and joint.is_contiguous():
        _launch(joint, rows, query_weight, key_weight, table, source, eps)
    else:
        norm_rotate_into_reference(joint, rows, query_weight, key_weight, table, source, eps)


def _norm_rotate_now(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, table: Tensor, eps: float
) -> Tensor:
    if backend(qkv.device).name != "triton":
        return norm_rotate_reference(qkv, query_weight, key_weight, table, eps)
    turned = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    rows = torch.arange(qkv.shape[0], device=qkv.device, dtype=torch.int32)
    _launch(turned, rows, query_weight, key_weight, table, qkv, eps)
    return turned


@torch.library.custom_op("diffusers_qwenimage::norm_rotate_into", mutates_args=("joint",))
def _norm_rotate_into(
    joint: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    source: Tensor | None,
    eps: float,
) -> None:
    _norm_rotate_into_now(joint, rows, query_weight, key_weight, table, source, eps)


@_norm_rotate_into.register_fake
def _(
    joint: Tensor,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    table: Tensor,
    source: Tensor | None,
    eps: float,
) -> None:
    return None


@torch.library.custom_op("diffusers_qwenimage::norm_rotate", mutates_args=())
def _norm_rotate(qkv: Tensor, query_weight: Tensor, key_weight: Tensor, table: Tensor, eps: float) -> Tensor:
    return _norm_rotate_now(qkv, query_weight, key_weight, table, eps)


@_norm_rotate.register_fake
def _(qkv: Tensor, query_weight: Tensor, key_weight: Tensor, table: Tensor, eps: float) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, query_weight, key_weight, table, eps = inputs
    ctx.save_for_backward(qkv, query_weight, key_weight, table)
    ctx.eps = eps


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    qkv, query_weight, key_weight, table = ctx.saved_tensors
    query, query_grad = _one_backward(qkv[:, 0], query_weight, table, ctx.eps, gradient[:, 0])
    key, key_grad = _one_backward(qkv[:, 1], key_weight, table, ctx.eps, gradient[:, 1])
    return torch.stack([query, key, gradient[:, 2]], dim=1), query_grad, key_grad, None, None


def _one_backward(
    x: Tensor, weight: Tensor, table: Tensor, eps: float, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of queries (or keys) and of the norm's weight; a turn is undone by turning back."""
    gradient = _turn(gradient.float(), table, back=True)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normalised = wide * inverse
    grad_weight = (gradient * normalised).sum((0, 1)).to(weight.dtype)
    gradient = gradient * weight.float()
    along = (gradient * normalised).mean(-1, keepdim=True)
    return (inverse * (gradient - normalised * along)).to(x.dtype), grad_weight


_norm_rotate.register_autograd(_backward, setup_context=_setup)
