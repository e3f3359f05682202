"""A linear layer whose weight is kept in 8 bits with a scale per output channel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_qwenimage.kernels.rows import (
    FP8,
    LIMITS,
    SMALLEST,
    Rows,
    Target,
    has_fp8_products,
    quantize_rows_reference,
)

# Of the scale of an fp8 weight for a row: 2^-16 of the largest value is next to nothing.
MOST_HALVINGS = 16


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a layer is quantised.

    Attributes:
        dtype: type of the weight.
        activations: whether the inputs are quantised too, per token, so that the product is one of 8 bits.
        rotation: largest block of inputs that is rotated together, a power of four; 0 for none.
        multiple: what the numbers of inputs and outputs must be multiples of.
    """

    dtype: torch.dtype
    activations: bool
    rotation: int
    multiple: int


SCHEMES = {
    "fp8": Scheme(dtype=FP8, activations=True, rotation=0, multiple=16),
    "int8": Scheme(dtype=torch.int8, activations=True, rotation=256, multiple=8),
    "fp8-storage": Scheme(dtype=FP8, activations=False, rotation=0, multiple=1),
}
KINDS = tuple(SCHEMES)


class QuantizedLinear(nn.Linear):
    """y = x weight^T + bias with a weight of 8 bits.

    Attributes:
        weight: [O, I] in float8_e4m3fn or int8, without gradient; its columns are rotated by blocks of
            `rotation`, if that is not 0.
        weight_scale: [O, 1], fp32: what a row of the weight is to be multiplied by.
        bias: [O] in the type of the model, or None.
        kind: a key of `SCHEMES`.
        rotation: size of the rotated blocks of inputs.
        compute_dtype: type of the model.

    Casting (`.to(dtype)`, `.half()`) changes the bias alone. Gradients reach the inputs and the bias.
    """

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: str,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `dtype` is that of the bias.

        Raises:
            ValueError: if there is no such kind, or it cannot have these sizes.
        """
        scheme = scheme_of(kind)
        if in_features % scheme.multiple or out_features % scheme.multiple:
            raise ValueError(
                f"A layer of {in_features} inputs and {out_features} outputs cannot be {kind}: both must be "
                f"multiples of {scheme.multiple}. Skip it."
            )
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.kind = kind
        self.compute_dtype = dtype or torch.get_default_dtype()  # what PEFT makes adapters of
        self.rotation = rotation_of(scheme, in_features)
        weight = torch.empty(out_features, in_features, device=device, dtype=scheme.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(out_features, 1, device=device, dtype=torch.float32)
        self.register_buffer("weight_scale", scale)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, kind: str) -> "QuantizedLinear":
        """The quantised form of a layer, on its device; the bias is shared.

        Raises:
            ValueError: if the kind cannot have these sizes, or the weight holds values that are not finite.
        """
        features = linear.in_features, linear.out_features
        bias = linear.bias is not None
        layer = cls(*features, kind=kind, bias=bias, device="meta", dtype=linear.weight.dtype)
        if not linear.weight.is_meta:
            weight, scale = quantize_weight(linear.weight, kind)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.weight_scale = scale
        layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def scheme(self) -> Scheme:
        """How this layer is quantised."""
        return SCHEMES[self.kind]

    def target(self, device: torch.device) -> Target | None:
        """How inputs on `device` are quantised; None if they are not."""
        scheme = SCHEMES[self.kind]
        if not scheme.activations or (scheme.dtype == FP8 and not has_fp8_products(device)):
            return None
        return Target(scheme.dtype, self.rotation)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight that the stored one stands for, [O, I]."""
        from diffusers_qwenimage.kernels.quantized import dequantize  # here, since it imports Triton

        return dequantize(self.weight, self.weight_scale, dtype, self.rotation)

    def forward(self, x: Tensor) -> Tensor:
        """The layer of x [..., I]: [..., O], in the type of x."""
        flat = x.reshape(-1, x.shape[-1])
        trained_bias = self.bias is not None and self.bias.requires_grad
        if torch.is_grad_enabled() and (x.requires_grad or trained_bias):
            y: Tensor = _Product.apply(flat, self)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        else:
            y = quantized_linear(flat, self)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"{super().extra_repr()}, kind={self.kind}, rotation={self.rotation}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        kept = {self.weight_scale.dtype, self.weight.dtype}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            own = tensor is self.weight or tensor is self.weight_scale
            if own and tensor.dtype in kept and result.dtype != tensor.dtype:
                self.compute_dtype = result.dtype
                result = tensor.to(result.device)
            return result

        super()._apply(moved, recurse)
        return self


class _Product(torch.autograd.Function):
    """The product without the bias; the gradient of x uses the weight dequantised again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return quantized_linear(x, layer, with_bias=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def quantized_linear(
    x: Tensor, layer: QuantizedLinear, out: Tensor | None = None, *, with_bias: bool = True
) -> Tensor:
    """The layer of x [N, I]: [N, O]; written into `out`, rows of any stride, if given. No gradients."""
    target = layer.target(x.device)
    if target is not None:
        from diffusers_qwenimage.kernels.quantized import quantize_rows  # here, since it imports Triton

        return scaled_linear_of(quantize_rows(x, target), layer, x.dtype, out, with_bias=with_bias)
    weight = layer.dequantized(x.dtype).t()
    if layer.bias is None or not with_bias:
        return torch.mm(x, weight, out=out)
    return torch.addmm(layer.bias.to(x.dtype), x, weight, out=out)


def scaled_linear_of(
    rows: Rows,
    layer: QuantizedLinear,
    dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    with_bias: bool = True,
) -> Tensor:
    """The layer of quantised rows: [N, O] in `dtype`; written into `out` if given. No gradients."""
    from diffusers_qwenimage.kernels.quantized import scaled_linear  # here, since it imports Triton

    bias = layer.bias if with_bias else None
    return scaled_linear(rows, layer.weight, layer.weight_scale, bias, dtype, out)


def quantize_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight [O, I] as the kind stores it, and its scales [O, 1].

    The scales of fp8 are that of the whole weight halved as often as a row allows. A floating type loses
    nothing by it, and the same values can be written with one scale for all rows, as ComfyUI reads them.

    Raises:
        ValueError: if it holds values that are not finite.
    """
    scheme = scheme_of(kind)
    if scheme.dtype != FP8:
        target = Target(scheme.dtype, rotation_of(scheme, weight.shape[1]))
        quantized, scale = quantize_rows_reference(weight, target)
    else:
        wide = weight.float()
        largest = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
        halvings = torch.log2(largest.amax() / largest).floor().clamp_max(MOST_HALVINGS)
        scale = largest.amax() / LIMITS[FP8] * torch.exp2(-halvings)
        quantized = (wide / scale).clamp(-LIMITS[FP8], LIMITS[FP8]).to(FP8)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("The weight holds values that are not finite; it cannot be quantised.")
    return quantized, scale


def scheme_of(kind: str) -> Scheme:
    """The scheme of this name.

    Raises:
        ValueError: if there is none.
    """
    if kind not in SCHEMES:
        raise ValueError(f"Weights cannot be kept as {kind!r}. Choose one of {', '.join(KINDS)}.")
    return SCHEMES[kind]


def unfit(linear: nn.Linear, kind: str) -> str | None:
    """Why this layer cannot be quantised; None if it can."""
    multiple = scheme_of(kind).multiple
    if linear.in_features % multiple or linear.out_features % multiple:
        return f"{linear.in_features} x {linear.out_features} are not both multiples of {multiple}"
    if not linear.weight.is_floating_point():
        return f"its weight is {linear.weight.dtype}"
    return None


def rotation_of(scheme: Scheme, in_features: int) -> int:
    """The largest power of four that divides the inputs, up to the scheme's; 0 for none."""
    block = scheme.rotation
    while block > 1 and in_features % block:
        block //= 4
    return block if block > 1 else 0
