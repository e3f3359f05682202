"""Modules that visit the device once, one after the other, from ordinary host memory or a mapped file."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from .block_visits import Visits
from .copy_lane import lane_to
from .mapped import MappedFeeder
from .memory import device_slab
from .placing import is_plain, layout_for
from .ring import Ring, Slot, Unit
from .survey import members_of

Module = TypeVar("Module", bound=nn.Module)
NUM_SLOTS = 2


def passing(modules: Sequence[Module], device: torch.device) -> Iterator[Module]:
    """Yield each module with its weights on `device`, until the next one is asked for.

    Meanwhile a thread copies the weights of the next through pinned memory, several times as fast as `.to`
    does. Modules that are on the device already are yielded as they are. Not for modules under gradients.
    """
    elsewhere = [
        [
            (member,)
            for member in members_of(module, "")
            if member.tensor.device != device and is_plain(member)
        ]
        for module in modules
    ]
    if not all(elsewhere):
        yield from modules
        return
    units = []
    for index, groups in enumerate(elsewhere):
        layout, members = layout_for(groups)
        homes = [member.tensor.detach() for member in members]
        units.append(Unit(name=str(index), members=members, layout=layout, homes=homes, slab=None))
    lane = lane_to(device)
    size = max(unit.layout.num_bytes for unit in units)
    slots = []
    for _ in range(NUM_SLOTS):
        slots.append(Slot(memory=device_slab(size, device), ready=lane.mark(), free=lane.mark()))
        lane.reach(slots[-1].free)
    feeder = MappedFeeder(lane, units, device)
    ring = Ring(units, [range(len(units))], slots, feeder=feeder, lane=lane, again=False)
    visits = Visits(units, modules, ring, device, aside=())
    try:
        for index, module in enumerate(modules):
            visits.enter(index)
            try:
                yield module
            finally:
                visits.leave()
    finally:
        feeder.stop()
        lane.drain()
        visits.close()
