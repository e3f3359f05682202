"""Attention whose result can be kept, so that a backward pass need not compute it again.

`torch.nn.functional.scaled_dot_product_attention` records its own gradient; here forward and backward are
separate calls of the same libraries: cuDNN where it takes the tensors (the fastest on Hopper), else
FlashAttention 2, and torch's CPU kernel.

Shapes: B samples, H heads, S tokens: queries, keys and values are [B, H, S, head_dim], any strides.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Attended:
    """The result of attention and what its backward pass needs beside queries, keys and values.

    Attributes:
        out: [B, H, S, head_dim]
        rest: what the library returned beside it.
        library: "cudnn", "flash" or "cpu".
    """

    out: Tensor
    rest: tuple[Any, ...]
    library: str


def attend(query: Tensor, key: Tensor, value: Tensor) -> Attended:
    """softmax(query key^T / sqrt(head_dim)) value."""
    library = _library(query, key, value)
    if library == "cudnn":
        out, *rest = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    elif library == "flash":
        out, *rest = aten._scaled_dot_product_flash_attention(query, key, value)
    else:
        out, *rest = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return Attended(out=out, rest=tuple(rest), library=library)


def attend_backward(
    attended: Attended, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values for that of the result."""
    saved = (gradient, query, key, value, attended.out)
    if attended.library == "cpu":
        (lse,) = attended.rest
        result = aten._scaled_dot_product_flash_attention_for_cpu_backward(*saved, lse, 0.0, False)
        return result[0], result[1], result[2]
    lse, starts_q, starts_k, max_q, max_k, seed, offset, *_ = attended.rest
    if attended.library == "cudnn":
        no_bias = None
        result = aten._scaled_dot_product_cudnn_attention_backward(
            *saved, lse, seed, offset, no_bias, starts_q, starts_k, max_q, max_k, 0.0, False
        )
    else:
        result = aten._scaled_dot_product_flash_attention_backward(
            *saved, lse, starts_q, starts_k, max_q, max_k, 0.0, False, seed, offset
        )
    return result[0], result[1], result[2]


def _library(query: Tensor, key: Tensor, value: Tensor) -> str:
    if query.device.type != "cuda":
        return "cpu"
    if can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, False, False)):
        return "cudnn"
    return "flash"
