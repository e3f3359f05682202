"""A ring of places on the device through which the streamed weights of all blocks pass.

Whoever visits block i borrows the slot that holds it. While it works, the free slots are filled with the
blocks that come next. Which these are: in inference the list in order, and from its end to its start for the
next step; with gradients, where a backward pass visits the blocks again from the last to the first, the
direction of the last two visits, turned around at the ends. A wrong guess costs time only: a block that is
not there is fetched when it is asked for.

Blocks fetched for the next pass may have been changed before that starts (a LoRA fused into them). A sample
of their bytes is compared then, and they are fetched again if it differs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .copy_lane import Lane, Mark
from .layout import Layout
from .memory import HostSlab, device_slab
from .survey import Member

if TYPE_CHECKING:  # it imports Triton
    from diffusers_qwenimage.kernels.packing import Packed

SAMPLES = 128  # bytes of each tensor that are compared


@dataclass(frozen=True, kw_only=True)
class PackedSlab:
    """The weights of a unit in fewer bytes (packed.py).

    Attributes:
        words: what is in the slab.
        slab: pinned memory.
        sample: of the weights when they were packed.
    """

    words: "Packed"
    slab: HostSlab
    sample: list[Tensor]


@dataclass(kw_only=True)
class Unit:
    """The streamed weights of one block.

    Attributes:
        name: of the block.
        members: the tensors' places in the module, in the order of the layout.
        layout: of the slab, and of the slot that holds it.
        homes: the tensors in host memory.
        slab: the memory of the homes, if it is in one piece.
        packed: what is copied in the place of the homes.
    """

    name: str
    members: tuple[Member, ...]
    layout: Layout
    homes: list[Tensor]
    slab: HostSlab | None
    packed: PackedSlab | None = None

    @property
    def sent_bytes(self) -> int:
        """What a visit copies."""
        return self.layout.num_bytes if self.packed is None else self.packed.words.memory.numel()

    def is_as_packed(self) -> bool:
        """Whether the weights are what was packed, as far as a sample tells."""
        return self.packed is not None and all(map(torch.equal, self.packed.sample, self.sample()))

    def drop_packed(self) -> None:
        """Copy the weights as they are again; nothing may be copying what was packed."""
        packed, self.packed = self.packed, None
        if packed is not None:
            packed.slab.unpin()
            if self.slab is not None:
                self.slab.register()

    def sample(self) -> list[Tensor]:
        """A few bytes of every tensor."""
        return [sample(home) for home in self.homes]


@dataclass(kw_only=True)
class Slot:
    """A place on the device for one unit.

    Attributes:
        memory: uint8.
        ready: reached when what was fetched is there.
        free: reached when what was there is not read any more.
        holds: the unit in it (or on its way to it).
        borrowed: whether a block works with it.
        fetched_in: the pass in which it was filled.
        sample: of the unit as it was fetched, if it was fetched for the next pass.
    """

    memory: Tensor
    ready: Mark
    free: Mark
    holds: int | None = None
    borrowed: bool = False
    fetched_in: int = 0
    sample: list[Tensor] | None = None
    _views: dict[Layout, list[Tensor]] = field(default_factory=dict)

    def empty(self) -> None:
        """Give the memory back. Nothing may be reading from it or writing to it."""
        self.memory, self.holds, self.sample = self.memory.new_empty(0), None, None
        self._views.clear()

    def views(self, layout: Layout) -> list[Tensor]:
        """The tensors of a unit of this layout in the slot; made once."""
        if layout not in self._views:
            self._views[layout] = layout.views(self.memory)
        return self._views[layout]


class Feeder:
    """Fills slots from slabs of pinned memory."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def pinned_bytes(self) -> int:
        """Pinned memory of its own, beside that of the units."""
        return 0

    def start(self, unit: Unit, slot: Slot) -> None:
        """Start to fill a slot; it may still be read until its mark `free`."""
        if unit.packed is not None:
            words = unit.packed.words.memory
            self._lane.copy(slot.memory[: words.numel()], words, after=slot.free, done=[slot.ready])
            return
        assert unit.slab is not None
        last = unit.slab.parts[-1][1]
        for start, end in unit.slab.parts:
            done = [slot.ready] if end == last else []
            memory = unit.slab.tensor[start:end]
            self._lane.copy(slot.memory[start:end], memory, after=slot.free, done=done)

    def has_failed(self, slot: Slot) -> bool:
        """Whether what was started last came to nothing: it may have been long ago, ahead of a visit."""
        return False

    def arrive(self, slot: Slot) -> None:
        """Let the work given from now on wait for what was started last."""
        self._lane.wait(slot.ready)

    def stop(self) -> None:
        """Finish; nothing is started afterwards."""

    def forget(self) -> None:
        """Let go of all units."""


class Ring:
    """Slots, and what is known of the order of visits.

    Args:
        units: all units; they are named by their index.
        lists: which units are visited one after the other.
        slots: at least one.
        feeder: fills slots.
        lane: the marks of the slots are its.
        again: whether the first units are visited again after the last ones.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        lists: Sequence[range],
        slots: Sequence[Slot],
        *,
        feeder: Feeder,
        lane: Lane,
        again: bool = True,
    ) -> None:
        self._units = units
        self._list_of = {index: indices for indices in lists for index in indices}
        self._slots = slots
        self._feeder = feeder
        self._lane = lane
        self._again = again
        self._last: int | None = None
        self._direction = 1
        self._pass = 0
        self._slot_bytes = max((slot.memory.numel() for slot in slots), default=0)
        self.fetched_bytes = 0
        self.num_changed = 0  # units that are not copied packed any more

    def borrow(self, index: int, *, with_gradient: bool) -> Slot:
        """The slot that holds a unit, for work given from now on until `give_back`."""
        self._wake()
        self._note_visit(index, with_gradient)
        slot = next((slot for slot in self._slots if slot.holds == index), None)
        if slot is None:
            slot = self._place_for(index, with_gradient)
            self._fetch(index, slot)
        elif self._is_stale(slot) or self._feeder.has_failed(slot):
            self._fetch(index, slot)
        self._feeder.arrive(slot)
        slot.borrowed = True
        try:
            self._fetch_ahead(index, with_gradient)
        except BaseException:
            slot.borrowed = False  # nobody gets it, so nobody would give it back
            raise
        return slot

    def give_back(self, slot: Slot, *, ahead: bool, with_gradient: bool = False) -> None:
        """Work that reads the slot has been given; `ahead`: fill it with what comes next."""
        index, slot.borrowed = slot.holds, False
        self._lane.reach(slot.free)
        if ahead and index is not None:
            self._fetch_ahead(index, with_gradient)

    def pass_by(self, index: int, *, with_gradient: bool) -> None:
        """A visit that finds its weights elsewhere on the device."""
        self._note_visit(index, with_gradient)
        self._fetch_ahead(index, with_gradient)

    def forget(self, index: int) -> None:
        """A unit has changed: what is in a slot is of no use, nor is what was packed."""
        for slot in self._slots:
            if slot.holds == index:
                slot.holds = None
        unit = self._units[index]
        if unit.packed is not None:
            self._lane.drain()
            unit.drop_packed()
            self.num_changed += 1

    def close(self) -> None:
        """Let go of units and slots; nothing is borrowed afterwards."""
        for slot in self._slots:
            slot.empty()
        self._feeder.forget()
        self._units, self._slots = (), ()

    def rest(self) -> None:
        """Give the memory of the slots back until the next visit."""
        for slot in self._slots:
            if slot.holds is not None:
                self._feeder.arrive(slot)  # a reader may not even have begun to copy
        self._lane.drain()
        for slot in self._slots:
            slot.empty()

    def _wake(self) -> None:
        for slot in self._slots:
            if slot.memory.numel() != self._slot_bytes:
                slot.memory = device_slab(self._slot_bytes, slot.memory.device)
                self._lane.reach(slot.free)  # what had this memory before is done with it by then

    def _note_visit(self, index: int, with_gradient: bool) -> None:
        indices, last = self._list_of[index], self._last
        self._last = index
        if last is None or last not in indices:
            self._direction, self._pass = 1, self._pass + 1
        elif index == last:
            self._pass += index == indices[0]
            self._direction = 1 if index == indices[0] else -1
        elif abs(index - last) == 1 and (with_gradient or index > last):
            self._direction = index - last
        else:
            self._direction, self._pass = 1, self._pass + 1

    def _next(self, index: int, with_gradient: bool) -> Iterator[tuple[int, bool]]:
        """What will probably be visited after `index`, and whether in another pass."""
        indices, direction, later = self._list_of[index], self._direction, False
        if len(indices) == 1:
            return
        while True:
            index += direction if with_gradient else 1
            if index not in indices:
                if not self._again:
                    return
                later = True
                if with_gradient:
                    direction = -direction
                    index += 2 * direction
                else:
                    index = indices[0]
            yield index, later

    def _fetch_ahead(self, index: int, with_gradient: bool) -> None:
        """Fill free slots with the next units, as far as slots go."""
        wanted: list[int] = [index] if any(s.borrowed and s.holds == index for s in self._slots) else []
        later = {}
        for following, is_later in self._next(index, with_gradient):
            if len(wanted) == len(self._slots) or following in wanted:
                break
            wanted.append(following)
            later[following] = is_later
        held = {slot.holds for slot in self._slots}
        places = [slot for slot in self._slots if not slot.borrowed and slot.holds not in wanted]
        for following, slot in zip([unit for unit in wanted if unit not in held], places, strict=False):
            self._fetch(following, slot, later=later[following])

    def _fetch(self, index: int, slot: Slot, *, later: bool = False) -> None:
        unit = self._units[index]
        slot.holds = None  # until the copy was given: it can fail
        slot.sample = unit.sample() if later else None
        self._feeder.start(unit, slot)
        slot.holds, slot.fetched_in = index, self._pass
        self.fetched_bytes += unit.sent_bytes

    def _is_stale(self, slot: Slot) -> bool:
        if slot.fetched_in == self._pass:
            return False
        assert slot.holds is not None
        slot.fetched_in = self._pass
        now = self._units[slot.holds].sample()
        return slot.sample is None or not all(map(torch.equal, slot.sample, now))

    def _place_for(self, index: int, with_gradient: bool) -> Slot:
        """A free slot; of several the one whose unit is needed last."""
        free = [slot for slot in self._slots if not slot.borrowed]
        assert free, "every slot is borrowed"
        for slot in free:
            if slot.holds is None:
                return slot
        soon: list[int] = []
        for following, _ in self._next(index, with_gradient):
            if following in soon or len(soon) == len(self._slots):
                break
            soon.append(following)
        return max(free, key=lambda slot: soon.index(slot.holds) if slot.holds in soon else len(soon))


def sample(tensor: Tensor) -> Tensor:
    """A few bytes of a tensor in host memory, from everywhere in it."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    stride = max(1, flat.numel() // SAMPLES) | 1  # odd: high and low bytes in turn
    return flat[::stride].clone()
