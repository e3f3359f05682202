"""Modules on the meta device: what their tensors shall be, which share one, and real ones in their place."""

import torch
from torch import Tensor, nn

from diffusers_qwenimage.checkpoint.assign import tied_names
from diffusers_qwenimage.quantize import QuantizedLinear

from .survey import Member


def made_here(module: nn.Module) -> list[str]:
    """Names in the state dict that come from quantising."""
    layers = module.named_modules()
    return [f"{name}.weight_scale" for name, layer in layers if isinstance(layer, QuantizedLinear)]


def tie(module: nn.Module) -> None:
    """Weights that share a tensor share it on the meta device too, so that it is placed once."""
    for name, target in tied_names(module).items():
        owner, of = (module.get_submodule(key.rpartition(".")[0]) for key in (name, target))
        owner._parameters[name.rpartition(".")[2]] = of._parameters[target.rpartition(".")[2]]


def ties(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Places of parameters that hang in another place too: (owner, name, other owner, name there)."""
    first: dict[int, tuple[nn.Module, str]] = {}
    ties = []
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in first:
                ties.append((owner, name, *first[id(parameter)]))
            first.setdefault(id(parameter), (owner, name))
    return ties


def is_quantised(module: nn.Module, name: str) -> bool:
    """Whether this is the weight of a quantised layer."""
    return isinstance(owner_of(module, name), QuantizedLinear) and name.endswith(".weight")


def owner_of(module: nn.Module, key: str) -> nn.Module:
    """The submodule that a tensor of this name hangs on."""
    return module.get_submodule(key.rpartition(".")[0])


def wanted_type(module: nn.Module, key: str) -> torch.dtype:
    """The type that the tensor of this name has in the module."""
    owner, name = owner_of(module, key), key.rpartition(".")[2]
    tensor = owner._parameters.get(name)
    return (owner._buffers[name] if tensor is None else tensor).dtype  # type: ignore[union-attr]


def hang(member: Member, tensor: Tensor) -> None:
    """Replace a tensor on the meta device (or a buffer) by a real one."""
    old = member.owner._parameters.get(member.name)
    if old is not None:
        member.owner._parameters[member.name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        member.owner._buffers[member.name] = tensor
