"""Linear layers that write where the next operation reads, with GELU at the end of the matrix product.

In bf16 the vendor's matrix products are the fastest there are, and they can add the bias and apply GELU
(tanh) before they write: no Triton kernel here. GELU before the write saves one pass over 4 D values per
token; its input is then not rounded to bf16.

Shapes: N tokens, I inputs, O outputs; weight [O, I] as in `nn.Linear`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from . import backend

_CUBIC = 0.044715  # of the tanh approximation, arXiv 1606.08415
_FACTOR = 0.7978845608028654  # sqrt(2 / pi)


# 1. Reference


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, tanh approximation, of the linear layer: [..., O]."""
    return gelu(linear(x, weight, bias), approximate="tanh")


# 2. Vendor library


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write the linear layer of `x` [N, I] into `out` [N, O], rows of any stride. No gradients."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear_now(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer of `x` [N, I]: [N, O]. No gradients."""
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def linear_gelu_now(x: Tensor, weight: Tensor, bias: Tensor, *, triton: bool) -> Tensor:
    """`linear_gelu` without gradients; `triton`: whether the backend of the device is that."""
    half = x.dtype in (torch.bfloat16, torch.float16)  # the library's tanh is too coarse for fp32
    # Private in torch, so it may go.
    if not (half and triton and x.is_cuda and hasattr(torch, "_addmm_activation")):
        return linear_gelu_reference(x, weight, bias)
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    result: Tensor = torch._addmm_activation(bias, flat, weight.t(), use_gelu=True)
    return result if x.ndim == 2 else result.view(*x.shape[:-1], -1)


def _linear_gelu_now(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_gelu_now(x, weight, bias, triton=backend(x.device).name == "triton")


# 3. Public


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, tanh approximation, of the linear layer of `x` [..., I]: [..., O]."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        result: Tensor = _linear_gelu(x, weight, bias)
        return result
    return _linear_gelu_now(x, weight, bias)


@torch.library.custom_op("diffusers_qwenimage::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _linear_gelu_now(x, weight, bias)


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = ctx.saved_tensors
    before = linear(x, weight, bias).float()
    inner = _FACTOR * (before + _CUBIC * before**3)
    tanh = torch.tanh(inner)
    slope = 0.5 * (1 + tanh) + 0.5 * before * (1 - tanh**2) * _FACTOR * (1 + 3 * _CUBIC * before**2)
    gradient = (gradient.float() * slope).to(x.dtype)
    flat, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
    return gradient @ weight, flat.t() @ inputs, flat.sum(0)


_linear_gelu.register_autograd(_backward, setup_context=_setup)
