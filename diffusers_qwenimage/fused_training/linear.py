"""Frozen linear layers with a trained LoRA, forward and backward by hand.

    y = x W^T + b + scale (x A^T) B^T
    dx = g W + scale (g B) A        dA = scale (g B)^T x        dB = scale g^T (x A^T)

W gets no gradient. A and B may be fp32 while x is bf16: they are cast once per block (`Factors`), and so are
their gradients.

Shapes: N tokens, I inputs, O outputs, r rank: A is [r, I], B is [O, r].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_qwenimage.module_hooks import is_hooked, is_idle_dropout
from diffusers_qwenimage.projections import joined


class Factors:
    """The trained weights of a block in the type that it computes in, and their gradients.

    Args:
        parameters: the weights.
        dtype: type to compute in.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._dtype = dtype
        self._values = _cast([parameter.detach() for parameter in parameters], dtype)
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._flat: Tensor
        self._gradients: list[Tensor] = []
        self._written = [False] * len(parameters)

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The weight, cast."""
        return self._values[self._index[id(parameter)]]

    def values(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Weights below each other; no copy if they were cast and follow each other."""
        values = [self.value(parameter) for parameter in parameters]
        together = joined(values)
        return torch.cat(values) if together is None else together

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where the weight's gradient is to be written; it then counts as written."""
        if not self._gradients:
            self._flat = self._values[0].new_empty(sum(value.numel() for value in self._values))
            self._gradients = _views(self._flat, self._values)
        index = self._index[id(parameter)]
        self._written[index] = True
        return self._gradients[index]

    def joint_gradient(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """Where the gradients of weights that follow each other are to be written; None if they do not."""
        return joined([self.gradient(parameter) for parameter in parameters])

    def gradients(self) -> list[Tensor | None]:
        """All gradients in the types of their weights; None where nothing was written."""
        if not self._gradients:
            return [None] * len(self._parameters)
        dtypes = {parameter.dtype for parameter in self._parameters}
        if len(dtypes) > 1:
            cast = [g.to(p.dtype) for g, p in zip(self._gradients, self._parameters, strict=True)]
        else:
            cast = _views(self._flat.to(dtypes.pop()), self._values)
        return [value if there else None for value, there in zip(cast, self._written, strict=True)]


class Base(Protocol):
    """The frozen part of a layer."""

    def write(self, out: Tensor, x: Tensor) -> None:
        """Write x W^T + b into `out` [N, O]."""

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        """Write gradient W into `out` [N, I]."""

    @property
    def num_outputs(self) -> int:
        """O."""


@dataclass(frozen=True, kw_only=True)
class PlainBase:
    """Weight [O, I] and bias [O] as they are."""

    weight: Tensor
    bias: Tensor | None

    def write(self, out: Tensor, x: Tensor) -> None:
        """x W^T + b."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        """gradient W."""
        torch.mm(gradient, self.weight, out=out)

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.weight.shape[0]


@dataclass(frozen=True, kw_only=True)
class CalledBase:
    """A frozen module of another kind: `write` calls it, `backward` asks it for its weight.

    Attributes:
        module: has `dequantized(dtype)`, its weight [O, I] in a type.
        num_outputs: O.
    """

    module: Any
    num_outputs: int

    def write(self, out: Tensor, x: Tensor) -> None:
        """Call the module."""
        out.copy_(self.module(x))

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        """gradient W, with the weight in the type of the gradient."""
        torch.mm(gradient, self.module.dequantized(gradient.dtype), out=out)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A frozen linear layer and its LoRA, if it has one."""

    base: Base
    down: nn.Parameter | None = None
    up: nn.Parameter | None = None
    scale: float = 1.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained weights."""
        return [part for part in (self.down, self.up) if part is not None]

    @property
    def plain(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias, if there is nothing else."""
        base = self.base
        if self.down is None and isinstance(base, PlainBase) and base.bias is not None:
            return base.weight, base.bias
        return None

    def apply(
        self, x: Tensor, factors: Factors, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The layer of `x` [N, I]: [N, O], and x A^T [N, r], which is `hidden` if that was kept."""
        out = x.new_empty(x.shape[0], self.base.num_outputs)
        self.base.write(out, x)
        if self.down is None or self.up is None:
            return out, None
        if hidden is None:
            hidden = x @ factors.value(self.down).t()
        out.addmm_(hidden, factors.value(self.up).t(), alpha=self.scale)
        return out, hidden

    def hidden(self, x: Tensor, factors: Factors) -> Tensor | None:
        """x A^T alone."""
        return None if self.down is None else x @ factors.value(self.down).t()

    def backward(
        self, gradient: Tensor, x: Tensor, hidden: Tensor | None, factors: Factors, into: Tensor | None
    ) -> None:
        """Gradients of the LoRA, and of `x` into `into` [N, I] unless it is None.

        Args:
            gradient: of the result, [N, O].
            x: the layer's input.
            hidden: x A^T.
            factors: where the LoRA's weights are and their gradients go.
            into: memory for the gradient of `x`; may be that of `x`, but not of `gradient`.
        """
        of_hidden = None
        if self.down is not None and self.up is not None:
            assert hidden is not None
            of_hidden = gradient @ factors.value(self.up)
            _write_product(factors.gradient(self.up), gradient.t(), hidden, self.scale)
            _write_product(factors.gradient(self.down), of_hidden.t(), x, self.scale)
        if into is None:
            return
        self.base.backward(into, gradient)
        if self.down is not None and of_hidden is not None:
            into.addmm_(of_hidden, factors.value(self.down), alpha=self.scale)


@dataclass(frozen=True, kw_only=True)
class Three:
    """Queries, keys and values: three layers of one input, side by side in the output."""

    layers: Sequence[Layer]

    @property
    def downs(self) -> list[nn.Parameter]:
        """A of those with a LoRA."""
        return [layer.down for layer in self.layers if layer.down is not None]

    @property
    def ups(self) -> list[nn.Parameter]:
        """B of those with a LoRA."""
        return [layer.up for layer in self.layers if layer.up is not None]

    def write(self, out: Tensor, x: Tensor, factors: Factors, hidden: Tensor | None = None) -> Tensor | None:
        """Write all three into `out` [N, 3 O].

        Returns:
            x A^T of those with a LoRA, side by side, which is `hidden` if that was kept.
        """
        together = self._together()
        columns = out.chunk(3, dim=1)
        if together is not None:
            together.write(out, x)
        else:
            for column, layer in zip(columns, self.layers, strict=True):
                layer.base.write(column, x)
        if not self.downs:
            return None
        if hidden is None:
            hidden = x @ factors.values(self.downs).t()
        ups = self._joined_ups(factors)
        if ups is not None:
            scale = self.layers[0].scale
            self._side_by_side(out).baddbmm_(self._side_by_side(hidden), ups.transpose(1, 2), alpha=scale)
        else:
            for column, layer, part in self._adapted(columns, hidden):
                column.addmm_(part, factors.value(layer.up).t(), alpha=layer.scale)
        return hidden

    def backward(
        self, gradient: Tensor, x: Tensor, hidden: Tensor | None, factors: Factors, into: Tensor | None
    ) -> None:
        """As `Layer.backward`, for all three; `gradient` is [N, 3 O]."""
        columns = gradient.chunk(3, dim=1)
        if into is not None:
            self._base_backward(into, gradient, columns)
        if hidden is None:
            return
        of_hidden = torch.empty_like(hidden)
        if not self._at_once(gradient, hidden, of_hidden, factors):
            both = zip(self._adapted(columns, hidden), self._adapted(columns, of_hidden), strict=True)
            for (column, layer, part), (_, _, piece) in both:
                _write_product(piece, column, factors.value(layer.up), layer.scale)
                _write_product(factors.gradient(layer.up), column.t(), part, layer.scale)
        of_downs = factors.joint_gradient(self.downs)
        if of_downs is not None:
            torch.mm(of_hidden.t(), x, out=of_downs)
        else:
            for _, layer, piece in self._adapted(columns, of_hidden):
                torch.mm(piece.t(), x, out=factors.gradient(layer.down))
        if into is not None:
            into.addmm_(of_hidden, factors.values(self.downs))

    def _at_once(self, gradient: Tensor, hidden: Tensor, of_hidden: Tensor, factors: Factors) -> bool:
        """scale g B and the gradient of B for all three in two products, if they are of one kind."""
        ups = self._joined_ups(factors)
        of_ups = None if ups is None else factors.joint_gradient(self.ups)
        if ups is None or of_ups is None:
            return False
        scale, kinds = self.layers[0].scale, len(self.layers)
        grads = self._side_by_side(gradient)
        _write_products(self._side_by_side(of_hidden), grads, ups, scale)
        of_ups = of_ups.unflatten(0, (kinds, -1))
        _write_products(of_ups, grads.transpose(1, 2), self._side_by_side(hidden), scale)
        return True

    def _joined_ups(self, factors: Factors) -> Tensor | None:
        """B of all three, [3, O, r], if they are of one kind and lie behind each other."""
        scales, shapes = {layer.scale for layer in self.layers}, {up.shape for up in self.ups}
        if len(self.ups) < len(self.layers) or len(scales) > 1 or len(shapes) > 1:
            return None
        ups = joined([factors.value(up) for up in self.ups])
        together: Tensor | None = None if ups is None else ups.unflatten(0, (len(self.layers), -1))
        return together

    def _side_by_side(self, columns: Tensor) -> Tensor:
        """[N, 3 K] -> [3, N, K], the same memory."""
        parts: Tensor = columns.unflatten(1, (len(self.layers), -1)).transpose(0, 1)
        return parts

    def _adapted(self, columns: Sequence[Tensor], hidden: Tensor) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """(columns of the output, layer, its part of `hidden`) for the layers with a LoRA."""
        offset = 0
        for column, layer in zip(columns, self.layers, strict=True):
            if layer.down is not None:
                rank = layer.down.shape[0]
                yield column, layer, hidden[:, offset : offset + rank]
                offset += rank

    def _together(self) -> PlainBase | None:
        """The three frozen parts as one, if their weights share a storage."""
        bases = [layer.base for layer in self.layers]
        plain = [base for base in bases if isinstance(base, PlainBase)]
        if len(plain) < len(bases):
            return None
        weight = joined([base.weight for base in plain])
        biases = [base.bias for base in plain if base.bias is not None]
        if weight is None or len(biases) not in (0, 3):
            return None
        bias = joined(biases) if biases else None
        return None if biases and bias is None else PlainBase(weight=weight, bias=bias)

    def _base_backward(self, into: Tensor, gradient: Tensor, columns: Sequence[Tensor]) -> None:
        together = self._together()
        if together is not None:
            together.backward(into, gradient)
            return
        self.layers[0].base.backward(into, columns[0])
        part = torch.empty_like(into)
        for layer, column in zip(self.layers[1:], columns[1:], strict=True):
            layer.base.backward(part, column)
            into += part


def find_layer(module: nn.Module, like: Tensor) -> Layer | None:
    """A linear module as a `Layer` for inputs like `like`; None if it is another thing than that."""
    if is_hooked(module):
        return None
    if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear":
        return _find_adapted(module, like)
    base = _find_base(module, like)
    return None if base is None else Layer(base=base)


def _find_base(module: Any, like: Tensor) -> Base | None:
    if is_hooked(module) or any(parameter.requires_grad for parameter in module.parameters()):
        return None
    if type(module) is nn.Linear:
        weight = module.weight
        if type(weight) is not nn.Parameter or weight.dtype != like.dtype or weight.device != like.device:
            return None
        return PlainBase(weight=weight, bias=module.bias)
    if hasattr(module, "dequantized"):
        return CalledBase(module=module, num_outputs=int(module.out_features))
    return None


def _find_adapted(module: Any, like: Tensor) -> Layer | None:
    base = _find_base(module.base_layer, like)
    if base is None or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not names:
        return Layer(base=base)
    name = names[0]
    down, up = module.lora_A[name], module.lora_B[name]
    plain = isinstance(down, nn.Linear) and isinstance(up, nn.Linear) and up.bias is None
    if len(names) > 1 or not plain or name in module.lora_variant or is_hooked(down) or is_hooked(up):
        return None
    if not is_idle_dropout(module.lora_dropout[name]):
        return None
    if not (down.weight.requires_grad and up.weight.requires_grad):
        return None
    return Layer(base=base, down=down.weight, up=up.weight, scale=float(module.scaling[name]))


def _cast(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another type, made in one pass and in one piece of memory; the values if they have it."""
    if all(value.dtype == dtype for value in values):
        return list(values)
    flat = torch.empty(sum(value.numel() for value in values), dtype=dtype, device=values[0].device)
    views = _views(flat, values)
    torch._foreach_copy_(views, list(values))
    return views


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of `flat` in the shapes of `like`."""
    parts = flat.split([value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]


def _write_products(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """scale a b of each pair of matrices."""
    if scale == 1.0:
        torch.bmm(a, b, out=out)
    else:
        torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _write_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """scale a b."""
    if scale == 1.0:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, beta=0, alpha=scale, out=out)
