"""Weights, gradients and optimizer states spread over the processes (FSDP2, `torch.distributed.fsdp`).

Every block of the dit is a group: its weights are gathered for its forward and its backward pass and given
back after that ("full", what DeepSpeed calls ZeRO-3), or kept between the two ("optimizer", ZeRO-2: the whole
model is on every device during a step, but not its gradients and optimizer states). Checkpoints hold whole
tensors, so that a run can go on with another number of processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_(transformer: Any, device: torch.device, *, reshard_after_forward: bool) -> None:
    """Spread a transformer in host memory over all processes, block by block.

    Args:
        transformer: ours; only a block at a time is whole on the device.
        device: of this process.
        reshard_after_forward: give gathered weights back after the forward pass.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        # Gathered weights have memory of their own, which must stay theirs: no common storage for q, k, v.
        block.attn.is_laid_out = True
    fully_shard(transformer, mesh=mesh, reshard_after_forward=False)


def give_back_(module: nn.Module) -> None:
    """Give gathered weights back now: before they are changed, where no backward pass came that does it."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(value: Any) -> Any:
    """A tensor as every process needs it for saving, on the CPU; all processes must take part."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    return value


def whole_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` with whole tensors."""
    return {
        "state": {
            index: {name: whole(value) for name, value in entries.items()}
            for index, entries in states["state"].items()
        },
        "param_groups": states["param_groups"],
    }


def spread(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is spread."""
    if isinstance(like, DTensor):
        moved = value.to(like.device, like.dtype)
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
    return value


def spread_states(states: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The reverse of `whole_states`: what has the shape of its weight is spread as that is."""
    spread_out: dict[int, dict[str, Any]] = {}
    for index, entries in states["state"].items():
        like = parameters[index]
        spread_out[index] = {
            name: spread(value.to(torch.float32), like.float())
            if isinstance(value, Tensor) and value.shape == like.shape
            else value
            for name, value in entries.items()
        }
    return {"state": spread_out, "param_groups": states["param_groups"]}
