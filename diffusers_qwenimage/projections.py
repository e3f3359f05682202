"""Linear modules applied to tokens and written into given memory, whatever hangs on them.

A plain `nn.Linear` is one matrix product. A LoRA of PEFT is that product and two thin ones, added in place.
A layer of 8 bits (quantize/) quantises its inputs first. Everything else (other adapters, hooks that move or
watch weights) is called as a module, and its result copied. `fuse_` lays the weights of queries, keys and
values behind each other in one storage, so that the three are one matrix product; the modules, their keys and
their values stay as they are.

Shapes: N tokens, I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.matmul import linear_into
from .module_hooks import is_hooked, is_idle_dropout
from .quantize.layers import QuantizedLinear, quantized_linear

GROUPS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """scale * up @ down, added to a weight.

    Attributes:
        down: [rank, I]
        up: [O, rank]
        scale: factor.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class OpenLinear:
    """What a linear module computes, as tensors.

    Attributes:
        weight: [O, I], in 8 bits if the layer is quantised.
        bias: [O]
        updates: of LoRAs.
        quantized: the layer whose weight and bias these are, if it is quantised.
    """

    weight: Tensor
    bias: Tensor | None
    updates: list[LowRank] = field(default_factory=list)
    quantized: QuantizedLinear | None = None


def fuse_(module: nn.Module) -> int:
    """Let queries, keys and values of every attention in `module` share one storage per stream.

    Returns:
        How many groups of three share a storage now. Groups that cannot (`_may_be_trained`, on the meta
        device, of mixed types, with hooks) are left alone.
    """
    gradients = torch.is_grad_enabled()
    return sum(
        _fuse_group([getattr(part, name) for name in names], gradients)
        for part in module.modules()
        for names in GROUPS
        if all(hasattr(part, name) for name in names)
    )


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, along the first dimension and without a copy, if they lie so in one storage."""
    first, rows = parts[0], 0
    row_size = first.stride(0) * first.element_size()
    for part in parts:
        there = part.data_ptr() == first.data_ptr() + rows * row_size
        if not (there and part.is_contiguous() and part.dtype == first.dtype):
            return None
        rows += part.shape[0]
    end = (first.storage_offset() + rows * first.stride(0)) * first.element_size()
    if first.untyped_storage().nbytes() < end:  # neighbours by chance, of different storages
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def project(x: Tensor, module: nn.Module) -> Tensor:
    """The linear layer of `x` [N, I]: [N, O]."""
    opened = open_linear(module, x)
    if opened is None:
        return _call(module, x)
    out = x.new_empty(x.shape[0], opened.weight.shape[0])
    _write(out, x, opened)
    return out


def project_into(out: Tensor, x: Tensor, module: nn.Module) -> None:
    """Write the linear layer of `x` [N, I] into `out` [N, O], rows of any stride."""
    opened = open_linear(module, x)
    if opened is None:
        out.copy_(_call(module, x))
    else:
        _write(out, x, opened)


def project_three_into(out: Tensor, x: Tensor, modules: Sequence[nn.Module]) -> None:
    """Write queries, keys and values of `x` [N, I] side by side into `out` [N, 3 O]."""
    opened = [open_linear(module, x) for module in modules]
    layers = [layer for layer in opened if layer is not None]
    columns = out.chunk(len(modules), dim=1)
    if len(layers) < len(modules) or not _base_into(out, x, layers):
        for column, module in zip(columns, modules, strict=True):
            project_into(column, x, module)
        return
    downs = [update.down for layer in layers for update in layer.updates]
    if not downs:
        return
    hidden = (x @ torch.cat(downs).t()).split([down.shape[0] for down in downs], dim=1)
    parts = iter(hidden)
    for column, layer in zip(columns, layers, strict=True):
        for update in layer.updates:
            column.addmm_(next(parts), update.up.t(), alpha=update.scale)


def open_linear(module: nn.Module, x: Tensor) -> OpenLinear | None:
    """The tensors of a linear module that can multiply `x`; None if the module must be called."""
    if is_hooked(module):
        return None
    if type(module) is nn.Linear:
        weight = module.weight
        if type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.device != x.device:
            return None
        return OpenLinear(weight=weight, bias=module.bias)
    if type(module) is QuantizedLinear:
        same_device = module.weight.device == x.device
        return OpenLinear(weight=module.weight, bias=module.bias, quantized=module) if same_device else None
    if type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear":
        return _open_lora(module, x)
    return None


def _open_lora(module: Any, x: Tensor) -> OpenLinear | None:
    base = open_linear(module.base_layer, x)
    if base is None or (module.disable_adapters and module.merged):
        return None  # calling it unmerges
    if module.disable_adapters or module.merged:
        return base
    updates = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up = open_linear(module.lora_A[name], x), open_linear(module.lora_B[name], x)
        if down is None or up is None or up.bias is not None or name in module.lora_variant:
            return None
        if not is_idle_dropout(module.lora_dropout[name]):
            return None
        updates.append(LowRank(down=down.weight, up=up.weight, scale=module.scaling[name]))
    return OpenLinear(weight=base.weight, bias=base.bias, updates=updates, quantized=base.quantized)


def _write(out: Tensor, x: Tensor, opened: OpenLinear) -> None:
    if opened.quantized is None:
        linear_into(out, x, opened.weight, opened.bias)
    elif out.is_contiguous():
        quantized_linear(x, opened.quantized, out)
    else:
        out.copy_(quantized_linear(x, opened.quantized))
    for update in opened.updates:
        out.addmm_(x @ update.down.t(), update.up.t(), alpha=update.scale)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x[None])[0]
    return result


def _base_into(out: Tensor, x: Tensor, layers: Sequence[OpenLinear]) -> bool:
    """Write several layers, without their updates, as one product, if their tensors lie behind each other."""
    weight = joined([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = joined(biases) if biases else None
    if weight is None or len(biases) not in (0, len(layers)) or (biases and bias is None):
        return False
    quantized = [layer.quantized for layer in layers if layer.quantized is not None]
    if not quantized:
        linear_into(out, x, weight, bias)
        return True
    scale = joined([layer.weight_scale for layer in quantized])
    if len(quantized) < len(layers) or scale is None or len({layer.kind for layer in quantized}) > 1:
        return False
    from .kernels.quantized import dequantize, quantize_rows, scaled_linear  # here, since it imports Triton

    target = quantized[0].target(x.device)
    if target is None:
        linear_into(out, x, dequantize(weight, scale, x.dtype, quantized[0].rotation), bias)
    else:
        scaled_linear(quantize_rows(x, target), weight, scale, bias, x.dtype, out)
    return True


@torch.no_grad()
def _fuse_group(modules: Sequence[nn.Module], gradients: bool) -> bool:
    layers: list[Any] = [getattr(module, "base_layer", module) for module in modules]
    kinds = {(type(layer), getattr(layer, "kind", None)) for layer in layers}
    if len(kinds) > 1 or type(layers[0]) not in (nn.Linear, QuantizedLinear) or any(map(is_hooked, layers)):
        return False
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if any(bias is None for bias in biases):
        biases = [] if all(bias is None for bias in biases) else [None]
    scales = [layer.weight_scale for layer in layers] if type(layers[0]) is QuantizedLinear else []
    if not all(type(tensor) is nn.Parameter for tensor in weights + biases) or weights[0].is_meta:
        return False
    for tensors in (weights, biases, scales):
        if len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) > 1:
            return False
    apart = [tensors for tensors in (weights, biases, scales) if tensors and joined(tensors) is None]
    if apart and any(_may_be_trained(layer, gradients) for layer in layers):
        return False
    with torch.inference_mode(False):
        for tensors in apart:
            parts = torch.cat([tensor.detach() for tensor in tensors]).split(
                [tensor.shape[0] for tensor in tensors]
            )
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.data = part
    return True


def _may_be_trained(layer: nn.Module, gradients: bool) -> bool:
    """Whether somebody may count on where the layer's weights are, an optimiser or a recorded step.

    Weights just loaded want gradients too. They may move while gradients are off if the layer is not in
    training, has none yet, and shares its memory with nothing: optimisers that shard keep all weights in one
    buffer.
    """
    return any(
        gradients
        or layer.training
        or tensor.grad is not None
        or tensor.untyped_storage().nbytes() != tensor.nbytes
        for tensor in layer.parameters(recurse=False)
        if tensor.requires_grad
    )
