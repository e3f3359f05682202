"""Which layers of a model are quantised, and doing it."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .layers import QuantizedLinear, scheme_of, unfit

logger = logging.getLogger(__name__)

# Layers outside the blocks are a hundredth of the weights and all of the latents pass through them.
OUTSIDE_BLOCKS = ("time_text_embed", "txt_norm", "img_in", "txt_in", "norm_out", "proj_out")
# The pipelines tabulate the modulation and need not have its weights on the device: 8 bits would save nothing
# there. They would cost nothing either (benchmarks/quantization.py): skip=OUTSIDE_BLOCKS takes them too.
MODULATION = ("img_mod", "txt_mod")
SKIPPED = (*OUTSIDE_BLOCKS, *MODULATION)


def quantize_(module: nn.Module, kind: str, *, skip: Sequence[str] = SKIPPED) -> list[str]:
    """Replace the linear layers of `module` by quantised ones, in place, on the device where they are.

    Layers are quantised one after the other, and the old weight is freed before the next one. Under a LoRA of
    PEFT the base layer is quantised. A model on the meta device gets empty quantised layers.

    Args:
        module: a transformer, or any module with `nn.Linear` layers.
        kind: "fp8": weights and activations in float8_e4m3fn, products in 8 bits (compute capability 8.9 or
            newer; elsewhere as "fp8-storage"). "int8": both in int8, rotated. "fp8-storage": weights in
            float8_e4m3fn, computed with in the type of the activations.
        skip: names of layers, or of modules with layers, that stay as they are: "img_mlp.net.2" is that layer
            of every block.

    Returns:
        Names of the quantised layers, also of those that were so before.

    Raises:
        ValueError: if there is no such kind, or a layer is quantised in another kind already.
    """
    scheme_of(kind)
    _forget_plans(module)
    names = []
    for name, parent, attribute, linear in list(linears(module)):
        if is_skipped(name, skip):
            continue
        if isinstance(linear, QuantizedLinear):
            if linear.kind != kind:
                raise ValueError(f"{name} is {linear.kind} already; load the model anew to make it {kind}.")
        elif type(linear) is not nn.Linear:
            logger.info("%s stays as it is: it is a %s.", name, type(linear).__name__)
            continue
        elif reason := unfit(linear, kind):
            logger.info("%s stays as it is: %s.", name, reason)
            continue
        else:
            setattr(parent, attribute, QuantizedLinear.from_linear(linear, kind))
        names.append(name)
    return names


def _forget_plans(module: nn.Module) -> None:
    """Let go of what the fused path made of the old weights: plans would keep them alive."""
    part: Any
    for part in module.modules():
        if getattr(part, "plan", None) is not None:
            part.plan = None
        if hasattr(part, "is_laid_out"):
            part.is_laid_out = False


def is_quantized(module: nn.Module) -> bool:
    """Whether any layer of the module is a `QuantizedLinear`."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether one of `skip` is a part of the dotted name."""
    return any(f".{part}." in f".{name}." for part in skip)


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """Name, parent, attribute and layer of every linear layer; LoRA layers themselves are left out.

    The name is that of the checkpoint: without "base_layer".
    """
    for name, parent in module.named_modules():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        for attribute, child in parent.named_children():
            if isinstance(child, nn.Linear):
                full = f"{name}.{attribute}" if name else attribute
                yield full.removesuffix(".base_layer"), parent, attribute, child
