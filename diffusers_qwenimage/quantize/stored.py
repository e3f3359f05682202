"""Quantised layers in files: the record in `config.json`, and ComfyUI's keys for single files.

A folder of diffusers keeps the tensors under the names of the module (`weight`, `weight_scale`, `bias`), and
its `config.json` says which layers are quantised:

    "quantization_config": {"quant_method": "diffusers-qwenimage", "layers": {"fp8": [names]}}

A single file follows ComfyUI (checkpoint/scaled.py): `L.weight` and `L.weight_scale`, with the format of the
layer as JSON bytes in `L.comfy_quant`: "float8_e4m3fn" with one scale for the layer, or "int8_tensorwise"
with one per output row and, if rotated, "convrot".
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_qwenimage.checkpoint.scaled import INT8_FORMAT, apply_scale
from diffusers_qwenimage.kernels.rows import FP8

from .apply import linears
from .layers import QuantizedLinear, quantize_weight, scheme_of, unfit

METHOD = "diffusers-qwenimage"


def record_of(module: nn.Module) -> dict[str, Any] | None:
    """What `config.json` says of the quantised layers of `module`; None if it has none."""
    layers: dict[str, list[str]] = {}
    for name, _, _, linear in linears(module):
        if isinstance(linear, QuantizedLinear):
            layers.setdefault(linear.kind, []).append(name)
    return {"quant_method": METHOD, "layers": layers} if layers else None


def quantize_layers_(module: nn.Module, layers: Mapping[str, list[str]]) -> None:
    """Replace exactly these layers, kind -> names, by quantised ones; see `quantize_`.

    Raises:
        ValueError: if the module has no such linear layer, or it cannot be of this kind.
    """
    found = {name: (parent, attribute, linear) for name, parent, attribute, linear in linears(module)}
    for kind, names in layers.items():
        scheme_of(kind)
        for name in names:
            if name not in found:
                raise ValueError(f"The model has no linear layer {name!r}, which its config says is {kind}.")
            parent, attribute, linear = found[name]
            if isinstance(linear, QuantizedLinear):
                if linear.kind != kind:
                    raise ValueError(f"{name} is {linear.kind} already and cannot become {kind}.")
            elif reason := unfit(linear, kind):
                raise ValueError(f"{name} cannot be {kind}: {reason}.")
            else:
                setattr(parent, attribute, QuantizedLinear.from_linear(linear, kind))


def stored_weight(
    layer: QuantizedLinear, weight: Tensor, scale: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """Weight and scales [O, 1] as the layer keeps them, for a weight from a file.

    What is stored as the layer wants it is taken as it is. Anything else is quantised, from the type that the
    model computes in, as if it had been loaded first.

    Args:
        layer: where it goes.
        weight: [O, I], of any type.
        scale: what to multiply it with, if it is of 8 bits; see `checkpoint.scaled.apply_scale`.
        rotation: size of the blocks in which its columns are rotated.
    """
    one = scale is not None and (scale.numel() == 1 or scale.shape == (weight.shape[0], 1))
    if scale is not None and one and weight.dtype == layer.weight.dtype and rotation == layer.rotation:
        return weight, scale.float().reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
    if scale is not None:
        weight = apply_scale(weight, scale, rotation)
    return quantize_weight(weight.to(layer.compute_dtype), layer.kind)


def comfyui_tensors(
    name: str, layer: QuantizedLinear, weight: Tensor, scale: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Weight and scales of a quantised layer in ComfyUI's convention; see `comfyui_shapes`.

    `weight` and `scale` are the layer's, or what would be if the layer were not empty.
    """
    if weight.dtype == FP8:
        weight, scale = one_scale(weight, scale)
    yield f"{name}.weight", weight
    yield f"{name}.weight_scale", scale
    yield f"{name}.comfy_quant", _settings(layer)


def comfyui_shapes(name: str, layer: QuantizedLinear) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of `comfyui_tensors`."""
    is_fp8 = layer.weight.dtype == FP8
    return {
        f"{name}.weight": (layer.weight.dtype, (layer.out_features, layer.in_features)),
        f"{name}.weight_scale": (torch.float32, () if is_fp8 else (layer.out_features, 1)),
        f"{name}.comfy_quant": (torch.uint8, tuple(_settings(layer).shape)),
    }


def one_scale(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """An fp8 weight with scales per row as one with a single scale: the largest.

    Exact, but for values below 2^-6 of the scale, where those of `quantize_weight` are meant: they differ by
    powers of two.
    """
    largest = scale.amax()
    return (weight.float() * (scale / largest)).to(FP8), largest.reshape(())


def _settings(layer: QuantizedLinear) -> Tensor:
    settings: dict[str, Any] = {"format": "float8_e4m3fn"}
    if layer.weight.dtype != FP8:
        settings = {"format": INT8_FORMAT, "per_row": True}
        if layer.rotation:
            settings |= {"convrot": True, "convrot_groupsize": layer.rotation}
    text = json.dumps(settings)
    text += " " * (-len(text) % 8)  # what follows in the file stays aligned
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
