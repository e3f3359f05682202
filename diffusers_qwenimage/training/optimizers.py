"""Optimizers by name or import path, the course of the learning rate, and the moving average of weights."""

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig

# Name -> (import path, package to install, arguments beside learning rate and weight decay).
OPTIMIZERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "adamw": ("torch.optim.AdamW", "torch", {}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", "bitsandbytes", {}),
    "adafactor": ("torch.optim.Adafactor", "torch", {}),
    "prodigy": ("prodigyopt.Prodigy", "prodigyopt", {"safeguard_warmup": True, "use_bias_correction": True}),
}


def find_optimizer(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer's class and its arguments.

    Raises:
        ValueError: if it is unknown or not installed, or its arguments are no JSON object.
    """
    path, package, defaults = OPTIMIZERS.get(config.optimizer, (config.optimizer, "", {}))
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"Unknown optimizer {path!r}: choose {', '.join(OPTIMIZERS)}, or the import path of a class."
        )
    if package and find_spec(package) is None:
        raise ValueError(f"The optimizer {config.optimizer} needs a package: pip install {package}.")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The optimizer {path} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"{path} is no optimizer: it must be a subclass of torch.optim.Optimizer.")
    return found, {**defaults, "weight_decay": config.weight_decay, **_arguments(config.optimizer_args)}


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over `parameters`.

    Raises:
        ValueError: as `find_optimizer`, or if the class does not take the arguments.
    """
    found, arguments = find_optimizer(config)
    make: Any = found
    if found is torch.optim.AdamW and parameters[0].is_cuda and "foreach" not in arguments:
        # One pass over weights, gradients and states, which a CUDA graph can hold.
        arguments = {"fused": True, "capturable": True, **arguments}
    try:
        optimizer: torch.optim.Optimizer = make(parameters, **{"lr": config.learning_rate, **arguments})
    except TypeError as error:
        raise ValueError(
            f"The optimizer {config.optimizer} does not take these arguments: {error}."
        ) from error
    if arguments.get("capturable"):
        optimizer._warned_capturable_if_run_uncaptured = True  # the first step of each shape is launched
    return optimizer


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Let the next steps have this rate; for a step that CUDA graphs can hold it is a tensor set in place."""
    for group in optimizer.param_groups:
        if not group.get("capturable", False):
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor) and group["lr"].device == group["params"][0].device:
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, device=group["params"][0].device)


def learning_rate_at(config: TrainConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step, counted from 0, of `num_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    left = 1 - min(done, 1.0)
    factor = left if config.lr_schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return config.learning_rate * factor


class MovingAverage:
    """An exponential moving average of weights, fp32. Early on, the average is over fewer steps."""

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay = decay
        self.values = {name: value.detach().float().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach().float(), 1 - decay)

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Put the averages into the parameters for a while."""
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _copy_(parameters, self.values)
        try:
            yield
        finally:
            _copy_(parameters, kept)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over saved averages."""
        for name, value in self.values.items():
            value.copy_(values[name])


@torch.no_grad()
def _copy_(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"optimizer_args must be JSON, got {text!r}: {error}.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"optimizer_args must be a JSON object, got {text!r}.")
    return arguments
