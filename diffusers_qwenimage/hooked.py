"""Whether a module is what it seems: nothing runs around its forward, and it does what its class says."""

from typing import cast

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn


def is_plain_feed_forward(module: nn.Module) -> bool:
    """Whether this module is two linear layers with GELU, tanh approximation, between them."""
    if type(module) is not FeedForward or is_hooked(module):
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
