"""Optimizer states in host memory: those of a weight visit the device for its step.

AdamW keeps two values of fp32 for every weight, 163 GB for the whole dit. Where every weight takes its step
by itself (`in_backward.py`), its states are needed for that moment only. They lie in pinned host memory. The
device has three slots: one is at work, one is filled for the weight that comes next (the order of a backward
pass is that of the one before), one is emptied. Both directions of the link are busy at once.

An outgoing copy has a number. A weight may be fetched ahead into a slot if its own last copy went out before
the slot's did: then waiting for the slot is waiting for both. Otherwise it is fetched when its turn comes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_qwenimage.offload.copy_lane import Mark, lane_to
from diffusers_qwenimage.offload.memory import HostMemory, HostSlab, device_slab

NUM_SLOTS = 3
SMALLEST = 1 << 20  # bytes; states of smaller weights stay on the device
ALIGNMENT = 256  # bytes

States = dict[str, Any]  # of one weight, as its optimizer holds them


@dataclass(kw_only=True, eq=False)
class _Visitor:
    """The streamed states of one weight.

    Attributes:
        states: the optimizer's dictionary, whose tensors are exchanged.
        places: name to (first byte, dtype, shape) in flat memory.
        host: that memory.
        written, number: mark and number of the last copy to it.
        next: who came after it in the last backward pass.
    """

    states: States
    places: Mapping[str, tuple[int, torch.dtype, torch.Size]]
    host: HostSlab
    written: Mark
    number: int = 0
    next: "_Visitor | None" = None

    @property
    def num_bytes(self) -> int:
        """Of the flat memory."""
        return self.host.tensor.numel()

    def point_to(self, flat: Tensor) -> None:
        """Let the optimizer find the states in flat memory."""
        for name, (start, dtype, shape) in self.places.items():
            part = flat[start : start + shape.numel() * dtype.itemsize]
            self.states[name] = part.view(dtype).view(shape)


@dataclass(kw_only=True, eq=False)
class _Slot:
    """Device memory for one visitor.

    Attributes:
        memory: uint8.
        ready, used, free: its states are there; the step was taken; they are in host memory again.
        holds: who is there, or on the way.
        number: of the last copy out of it.
    """

    memory: Tensor
    ready: Mark
    used: Mark
    free: Mark
    holds: _Visitor | None = None
    number: int = 0


@dataclass(kw_only=True, eq=False)
class HostStates:
    """The states of optimizers over single weights, kept in host memory.

    Attributes:
        device: where the steps are taken.
        smallest: bytes below which the states of a weight stay on the device.
    """

    device: torch.device
    smallest: int = field(default_factory=lambda: SMALLEST)
    _visitors: dict[int, _Visitor | None] = field(default_factory=dict)
    _slots: list[_Slot] = field(default_factory=list)
    _turn: int = 0
    _number: int = 0
    _last: _Visitor | None = None
    _at_work: _Slot | None = None

    def __post_init__(self) -> None:
        self._memory = HostMemory(self.device)
        self._inward, self._outward = lane_to(self.device), lane_to(self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(visitor.num_bytes for visitor in self._visitors.values() if visitor)

    def bring(self, index: int) -> None:
        """Before the step of a weight: its states on the device."""
        visitor = self._visitors.get(index)
        if visitor is None:
            return
        slot = next((slot for slot in self._slots if slot.holds is visitor), None)
        if slot is None:
            slot = self._next_slot(visitor.num_bytes)
            self._outward.host_wait(visitor.written)
            self._fetch(slot, visitor)
        self._inward.wait(slot.ready)
        visitor.point_to(slot.memory)
        self._at_work = slot
        if self._last is not None:
            self._last.next = visitor
        self._last = visitor

    def take(self, index: int, states: States) -> None:
        """After the step of a weight, or after its states were loaded: they go to host memory."""
        if index not in self._visitors:
            self._settle_in(index, states)
            return
        visitor, slot = self._visitors[index], self._at_work
        if visitor is None or slot is None:
            return
        self._at_work = None
        self._number += 1
        visitor.number = slot.number = self._number
        self._outward.reach(slot.used)
        there = slot.memory[: visitor.num_bytes]
        self._outward.copy(visitor.host.tensor, there, after=slot.used, done=(slot.free, visitor.written))
        visitor.point_to(visitor.host.tensor)
        slot.holds = None
        self._fetch_ahead(visitor.next)

    def settle(self) -> None:
        """Wait until everything is in host memory: before states are read or replaced."""
        self._outward.drain()

    def forget(self) -> None:
        """Before other states are loaded in the place of those there are."""
        self.settle()
        self._visitors.clear()
        self._slots.clear()
        self._last = self._at_work = None

    def _settle_in(self, index: int, states: States) -> None:
        """Make room for new states, and move them there."""
        large = {
            name: value
            for name, value in states.items()
            if isinstance(value, Tensor) and value.numel() * value.element_size() >= self.smallest
        }
        self._visitors[index] = None
        if not large:
            return
        places, end = {}, 0
        for name, value in large.items():
            places[name] = (end, value.dtype, value.shape)
            end += -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT
        host = self._memory.pin(self._memory.slab(end))
        mark = self._outward.mark()
        visitor = _Visitor(states=states, places=places, host=host, written=mark)
        visitor.point_to(host.tensor)
        for name, value in large.items():
            states[name].copy_(value)
        self._outward.reach(mark)
        self._visitors[index] = visitor

    def _fetch_ahead(self, visitor: _Visitor | None) -> None:
        if visitor is None or any(slot.holds is visitor for slot in self._slots):
            return
        slot = self._next_slot(visitor.num_bytes)
        if visitor.number <= slot.number:
            self._fetch(slot, visitor)

    def _fetch(self, slot: _Slot, visitor: _Visitor) -> None:
        there = slot.memory[: visitor.num_bytes]
        self._inward.copy(there, visitor.host.tensor, after=slot.free, done=(slot.ready,))
        slot.holds = visitor

    def _next_slot(self, num_bytes: int) -> _Slot:
        """The slot whose turn it is, with memory for so many bytes."""
        if not self._slots:
            largest = max(visitor.num_bytes for visitor in self._visitors.values() if visitor)
            self._slots = [self._new_slot(largest) for _ in range(NUM_SLOTS)]
        slot = self._slots[self._turn % NUM_SLOTS]
        self._turn += 1
        slot.holds = None
        if slot.memory.numel() < num_bytes:
            self._outward.drain()  # nothing copies to or from memory that goes
            slot.memory = device_slab(num_bytes, self.device)
        return slot

    def _new_slot(self, num_bytes: int) -> _Slot:
        mark = self._outward.mark
        return _Slot(memory=device_slab(num_bytes, self.device), ready=mark(), free=mark(), used=mark())
