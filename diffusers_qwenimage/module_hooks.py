"""Whether a module is what it seems: nothing runs around its forward, and it does what its class says."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn

STREAM_HOOK = "diffusers_qwenimage_stream"  # of offload/, in diffusers' registry of a module's hooks


def is_plain_feed_forward(module: nn.Module) -> bool:
    """Whether this module is two linear layers with GELU, tanh approximation, between them."""
    if type(module) is not FeedForward or (is_hooked(module) and not is_only_streamed(module)):
        return False
    first, dropout, *rest = cast(nn.ModuleList, module.net)
    if len(rest) != 1:
        return False
    if type(first) is not GELU or first.approximate != "tanh" or is_hooked(first):
        return False
    return is_idle_dropout(dropout)


def is_idle_dropout(module: nn.Module) -> bool:
    """Whether the module passes on what it gets."""
    if is_hooked(module):
        return False
    return type(module) is nn.Identity or (
        type(module) is nn.Dropout and (module.p == 0 or not module.training)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether something runs around the module's forward, or instead of it."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    forward = module.__dict__.get("forward")  # how accelerate and diffusers hook
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_only_streamed(module: nn.Module) -> bool:
    """Whether all that happens around the module's forward is that its weights come and go."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    registry: Any = module.__dict__.get("_diffusers_hook")
    return registry is not None and list(registry._hook_order) == [STREAM_HOOK]


def comes_in_parts(module: nn.Module) -> bool:
    """Whether the weights of the module's children come and go, one child at a time."""
    return any(_stream_hook(child) is not None for child in module._modules.values() if child is not None)


def visit(module: nn.Module) -> AbstractContextManager[None]:
    """Around reading the weights of a module that is not called: they are there meanwhile."""
    hook = _stream_hook(module)
    visiting: AbstractContextManager[None] = nullcontext() if hook is None else hook.visit()
    return visiting


def _stream_hook(module: nn.Module) -> Any:
    registry: Any = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(STREAM_HOOK)
