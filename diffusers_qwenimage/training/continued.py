"""A run that begins with the LoRA of a file, of any format that the LoRA library reads.

The file's change of the weights is the adapter's, exactly: its scale goes into the factors B (fp32), and
where the adapter has a larger rank, the rest of A stays as it was drawn and that of B is 0. Modules that the
file does not change begin as without it. What does not fit is refused, and so is what is no LoRA or DoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_qwenimage.lora.apply import PREFIX, to_peft
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.read import listing, read_lora

from .config import TrainConfig

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a file says of an adapter.

    Attributes:
        name: of the file.
        tensors: by PEFT's name without that of the adapter, such as "...to_q.lora_A.weight".
        scales: of the product of the factors, by module.
    """

    name: str
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]


def read_beginning(config: TrainConfig) -> Beginning | None:
    """The LoRA in `lora_checkpoint`; None without one.

    Raises:
        ValueError: if the file is not a LoRA of the kind that is trained, or its rank is larger.
        FileNotFoundError: if there is no such file.
    """
    if config.lora_checkpoint is None:
        return None
    path = Path(config.lora_checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"lora_checkpoint: there is no file {path}.")
    file = read_lora(path)
    adapter = to_peft(file.updates)
    tensors = {key.removeprefix(f"{PREFIX}."): value for key, value in adapter.state_dict.items()}
    kind = (
        "lokr" if adapter.metadata is None else "dora" if any(MAGNITUDE in key for key in tensors) else "lora"
    )
    if kind != config.adapter or kind == "lokr":
        raise ValueError(
            f"lora_checkpoint: {path} is a {kind} and a {config.adapter} is trained. A run can begin with a "
            "lora or a dora, and adapter must be what the file is."
        )
    ranks = {key: value.shape[0] for key, value in tensors.items() if f".{A}." in key}
    largest = max(ranks.values())
    if largest > config.lora_rank:
        raise ValueError(
            f"lora_checkpoint: {path} has rank {largest} and lora_rank is {config.lora_rank}: set lora_rank "
            f"to {largest} or more, or make it smaller first (qwenimage lora resize)."
        )
    transformer = [update for update in file.updates if update.component == "transformer"]
    updates = split_all(transformer, file.architecture)
    scales = {update.module: update.scale.value for update in updates}
    return Beginning(name=str(path), tensors=tensors, scales=scales)


@torch.no_grad()
def begin_with_(transformer: Any, beginning: Beginning, adapter_name: str) -> None:
    """Give the adapter of a transformer the change of a file.

    Raises:
        ValueError: if the file changes modules that are not trained, or of another size.
    """
    modules = dict(transformer.named_modules())
    adapted = {
        f"{name}.{part}": (module, part)
        for name, module in modules.items()
        if hasattr(module, "lora_A")
        for part in (f"{A}.weight", f"{B}.weight", f"{MAGNITUDE}.weight", MAGNITUDE)
    }
    unknown = [key for key in beginning.tensors if key not in adapted]
    if unknown:
        raise ValueError(
            f"lora_checkpoint: {beginning.name} changes modules that get no LoRA: {listing(unknown)}. Name "
            "them in lora_target_modules."
        )
    for key, value in beginning.tensors.items():
        module, part = adapted[key]
        kind = part.split(".")[0]
        parameter = getattr(module, kind)[adapter_name].weight
        if kind == B:
            name = key.removesuffix(f".{part}")
            value = value.float() * (beginning.scales[name] / module.scaling[adapter_name])
        _write(parameter, value, beginning.name, key, along={A: 0, B: 1}.get(kind))


def _write(parameter: Tensor, value: Tensor, name: str, key: str, *, along: int | None) -> None:
    """Write a tensor into the first part of a parameter, along the dimension that is its rank."""
    expected = list(parameter.shape)
    if along is not None:
        expected[along] = value.shape[along]
    if list(value.shape) != expected:
        raise ValueError(
            f"lora_checkpoint: {name} has {key} of shape {list(value.shape)} and the model needs {expected}: "
            "the LoRA is of another model."
        )
    there = parameter if along is None else parameter.narrow(along, 0, value.shape[along])
    if along == 1:
        parameter.zero_()
    there.copy_(value)
