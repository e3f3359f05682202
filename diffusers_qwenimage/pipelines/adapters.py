"""A LoRA of any format on a transformer, as a PEFT adapter; nothing is skipped without a word.

Both doors use this: `attach_lora` loads, and checks that every tensor found its layer; `detach_loras` undoes
it.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusers_qwenimage.lora.apply import PREFIX, PeftAdapter, to_peft
from diffusers_qwenimage.lora.read import NUM_LISTED, LoraFile, listing, read_lora, read_state_dict
from diffusers_qwenimage.lora.sources import Access, find_lora

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | Mapping[str, Tensor]


def open_lora(
    source: Source,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    access: Access | None = None,
) -> LoraFile:
    """A LoRA from wherever it is; a state dict is taken as the content of a file without metadata."""
    if isinstance(source, Mapping):
        return read_state_dict(source)
    path = find_lora(
        source if isinstance(source, str) else Path(source),
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        local_files_only=local_files_only,
        access=access,
    )
    return read_lora(path)


def attach_lora(
    transformer: Any,
    file: LoraFile,
    *,
    adapter_name: str | None = None,
    strength: float | None = None,
    hotswap: bool = False,
    pipeline: Any = None,
    low_cpu_mem_usage: bool = True,
) -> str:
    """Add a LoRA to a transformer as a PEFT adapter; returns the adapter's name.

    Args:
        transformer: a model with diffusers' `PeftAdapterMixin`.
        strength: if given, this adapter works at that strength beside all others; if None, which adapters
            are active follows diffusers (`set_adapters`).
        pipeline: the pipeline around it, whose offloading is lifted meanwhile.

    Raises:
        ValueError: if nothing matches, something does not fit, or the name is taken.
    """
    adapter = peft_adapter(file)
    _check_fit(transformer, adapter, file)
    name = adapter_name if adapter_name is not None else _free_name(transformer)
    before = _active_names(transformer)
    with warnings.catch_warnings():
        # PEFT warns of every adapter after the first; several are the purpose of names.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        transformer.load_lora_adapter(
            dict(adapter.state_dict),
            prefix=PREFIX,
            metadata=adapter.metadata,
            adapter_name=name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=pipeline,
        )
    _check_attached(transformer, adapter, name)
    _keep_precision(transformer, adapter, name)
    if strength is not None:
        _activate_beside(transformer, name, strength, before | {name})
    logger.info("%s: %d modules changed, as adapter %r.", file.name, len(adapter.shapes), name)
    return name


def detach_loras(transformer: Any) -> None:
    """Remove all adapters from a transformer."""
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()


def peft_adapter(file: LoraFile) -> PeftAdapter:
    """The adapter of a file; warns of a part for the text encoder, which is not applied.

    Raises:
        ValueError: if an update has no form there; see `lora.apply.to_peft`.
    """
    try:
        adapter = to_peft(file.updates, file.architecture)
    except ValueError as error:
        raise ValueError(f"{file.name} cannot be loaded ({describe(file)}). {error}") from error
    if adapter.left_out:
        logger.warning(
            "%s also changes the text encoder (%d modules, such as %s); that part is not applied.",
            file.name,
            len(adapter.left_out),
            adapter.left_out[0],
        )
    return adapter


def describe(file: LoraFile) -> str:
    """The formats and kinds of a file, for messages."""
    kinds = sorted({update.kind for update in file.updates})
    return f"formats {', '.join(file.formats) or 'none'}; kinds {', '.join(kinds) or 'none'}"


def _check_fit(transformer: nn.Module, adapter: PeftAdapter, file: LoraFile) -> None:
    """Every module must exist and have the size of the change."""
    modules = dict(transformer.named_modules())
    missing = [name for name in adapter.shapes if name not in modules]
    if len(missing) == len(adapter.shapes):
        raise ValueError(
            f"{file.name} matches no layer of {type(transformer).__name__}: {describe(file)}, first keys "
            f"{', '.join(list(file.tensors)[:3])}."
        )
    problems = [f"{name} does not exist there" for name in missing]
    for name, shape in adapter.shapes.items():
        size = _size(modules[name]) if name in modules else None
        if size is not None and size != shape:
            problems.append(f"{name}: a change of {list(shape)} for a layer of {list(size)}")
    if problems:
        raise ValueError(
            f"{file.name} does not fit {type(transformer).__name__}: {listing(problems)}. It was made for "
            "another model."
        )


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a layer, also of one that is quantised or already has an adapter."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for names in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if all(isinstance(getattr(base, name, None), int) for name in names):
            return getattr(base, names[0]), getattr(base, names[1])
    return None


def _check_attached(transformer: nn.Module, adapter: PeftAdapter, name: str) -> None:
    """Every tensor must have found its parameter: diffusers only warns of those that have not."""
    holders = {
        key: module for key, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)
    }
    empty = [
        key
        for key in adapter.shapes
        if key not in holders
        or not any(name in getattr(holders[key], layers, {}) for layers in holders[key].adapter_layer_names)
    ]
    if empty:
        raise ValueError(
            f"The adapter {name!r} did not reach {len(empty)} of {len(adapter.shapes)} layers, such as "
            f"{', '.join(empty[:NUM_LISTED])}."
        )


def _keep_precision(transformer: Any, adapter: PeftAdapter, name: str) -> None:
    """Give the adapter the compute type where PEFT gave it the fp8 storage type of its base, from the values
    in the file: those that went through fp8 are rounded."""
    dtype: torch.dtype = transformer.dtype  # the compute type where diffusers casts layer by layer
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    for key, module in transformer.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for role, parameter in _parameters(module, name).items():
            value = adapter.state_dict.get(f"{PREFIX}.{key}.{role}")
            if value is not None and parameter.dtype.itemsize == 1:
                parameter.data = value.to(parameter.device, dtype)


def _parameters(module: BaseTunerLayer, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter in a layer, by their names in a state dict."""
    found: dict[str, nn.Parameter] = {}
    for layers in module.adapter_layer_names:
        holder = getattr(module, layers, {})
        if name not in holder:
            continue
        entry = holder[name]
        if isinstance(entry, nn.Parameter):
            found[layers] = entry
        else:
            suffix = "" if layers == "lora_magnitude_vector" else ".weight"
            found[f"{layers}{suffix}"] = entry.weight
            if getattr(entry, "bias", None) is not None:
                found[f"{layers}.bias"] = entry.bias
    return found


def _active_names(transformer: nn.Module) -> set[str]:
    layers = (module for module in transformer.modules() if isinstance(module, BaseTunerLayer))
    return {name for layer in layers for name in layer.active_adapters}


def _activate_beside(transformer: nn.Module, name: str, strength: float, names: set[str]) -> None:
    """Make an adapter active at a strength without touching the strength of the others."""
    for layer in transformer.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        own = {key for layers in layer.adapter_layer_names for key in getattr(layer, layers, {})}
        layer.set_adapter(sorted(names & own))
        if name in own:
            layer.scaling[name] *= strength


def _free_name(transformer: nn.Module) -> str:
    taken = getattr(transformer, "peft_config", {})
    number = len(taken)
    while f"default_{number}" in taken:
        number += 1
    return f"default_{number}"
