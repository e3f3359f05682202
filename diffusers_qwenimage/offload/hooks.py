"""Hooks on modules, in diffusers' registry under names of our own.

A hook that brings weights must be the innermost: a step cache above it then decides whether the block runs at
all, before anything is copied.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

CALL_HOOK = "diffusers_qwenimage_on_call"
GATHER_HOOK = "diffusers_qwenimage_gather"


class StreamHook(ModelHook):
    """Runs a module between entering and leaving, whatever happens in it."""

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        super().__init__()
        self._enter = enter
        self._leave = leave

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module, with its weights on the device."""
        self._enter()
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self._leave()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Around reading the weights without calling the module."""
        self._enter()
        try:
            yield
        finally:
            self._leave()


class CallHook(ModelHook):
    """Brings the weights of a module to the device for a call."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module on the device; its weights in host memory stay as they are."""
        homes: list[tuple[Tensor, Tensor]] = []
        try:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type != self._device.type:
                    homes.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(self._device, non_blocking=True)
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            for tensor, home in homes:
                tensor.data = home


class GatherHook(ModelHook):
    """Looks rows of an embedding up in host memory and sends them to the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def new_forward(self, module: nn.Module, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of `ids`, on the device."""
        there = next(module.parameters()).device
        return self.fn_ref.original_forward(ids.to(there), *args, **kwargs).to(self._device)


def add_innermost(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook below those that the module has."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    above = _take_off(registry, list(registry._hook_order))
    try:
        registry.register_hook(hook, name)
    finally:
        _put_on(registry, above)


def refuse_accelerate(module: nn.Module) -> None:
    """Two that move the same weights cannot live together.

    Raises:
        ValueError: if accelerate's hooks are on the module or in it.
    """
    for part in module.modules():
        if hasattr(part, "_hf_hook"):
            raise ValueError(
                f"{type(part).__name__} has a hook of accelerate (device_map, CPU offload). Remove it first: "
                "pipe.remove_all_hooks()."
            )


def remove(module: nn.Module, name: str) -> None:
    """Remove a hook; those above it stay."""
    registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
    if registry is None or registry.get_hook(name) is None:
        return
    order = list(registry._hook_order)
    # diffusers' own removal from the middle of a chain loses what the hook above does.
    above = _take_off(registry, order[order.index(name) + 1 :])
    registry.remove_hook(name, recurse=False)
    _put_on(registry, above)
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # else a copy of the module would run this one


def _take_off(registry: HookRegistry, names: list[str]) -> list[tuple[str, ModelHook]]:
    hooks = [(name, registry.get_hook(name)) for name in names]
    for name in reversed(names):
        registry.remove_hook(name, recurse=False)
    return hooks


def _put_on(registry: HookRegistry, hooks: list[tuple[str, ModelHook]]) -> None:
    for name, hook in hooks:
        registry.register_hook(hook, name)
