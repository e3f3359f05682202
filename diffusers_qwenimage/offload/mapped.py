"""Weights that stay in a memory-mapped file: a thread reads them into pinned memory, part by part, and sends
them on.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .copy_lane import Lane, Mark
from .layout import Layout
from .memory import HostMemory, HostSlab
from .ring import Feeder, Slot, Unit

NUM_BUFFERS = 3
BUFFER_BYTES = 64 * 2**20  # small: they are pinned before the first block comes


def buffer_bytes(largest: int) -> int:
    """Pinned memory that it takes to send units of at most `largest` bytes."""
    return NUM_BUFFERS * min(BUFFER_BYTES, largest)


@dataclass(kw_only=True)
class _Buffer:
    slab: HostSlab
    sent: Mark


@dataclass(kw_only=True)
class _Order:
    unit: Unit
    slot: Slot
    given: threading.Event
    error: Exception | None = None


class MappedFeeder(Feeder):
    """Fills slots through a few pinned buffers; from units that are pinned, straight.

    Args:
        lane: copies from the buffers to the slots.
        units: what will be asked for, to size the buffers.
        device: where the slots are.
    """

    def __init__(self, lane: Lane, units: Sequence[Unit], device: torch.device) -> None:
        super().__init__(lane)
        memory = HostMemory(device)
        size = buffer_bytes(max(unit.layout.num_bytes for unit in units)) // NUM_BUFFERS
        self._buffers = [
            _Buffer(slab=memory.pin(memory.slab(size)), sent=lane.mark()) for _ in range(NUM_BUFFERS)
        ]
        self._turn = 0
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._last: dict[int, _Order] = {}
        self._thread = threading.Thread(target=self._work, name="weights", daemon=True)
        self._thread.start()

    @property
    def pinned_bytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.slab.tensor.numel() for buffer in self._buffers)

    def start(self, unit: Unit, slot: Slot) -> None:
        """Ask the thread to fill a slot, or fill it from pinned memory."""
        if unit.slab is not None:
            before = self._last.pop(id(slot), None)
            if before is not None:
                before.given.wait()  # else it could come behind this one
            super().start(unit, slot)
            return
        order = _Order(unit=unit, slot=slot, given=threading.Event())
        self._last[id(slot)] = order
        self._orders.put(order)

    def has_failed(self, slot: Slot) -> bool:
        """Whether the thread could not read what was asked for last; waits for it."""
        order = self._last.get(id(slot))
        if order is None:
            return False
        order.given.wait()
        return order.error is not None

    def arrive(self, slot: Slot) -> None:
        """Wait until the thread has sent the block on, then let the device wait for it.

        Raises:
            OSError, RuntimeError: if it could not be read or sent.
        """
        order = self._last.get(id(slot))
        if order is not None:
            order.given.wait()
            if order.error is not None:
                slot.holds = None
                raise order.error
        super().arrive(slot)

    def stop(self) -> None:
        """Let the thread finish what was asked for, and end; only pinned units can be asked for then."""
        self._orders.put(None)
        self._thread.join()
        for buffer in self._buffers:
            self._lane.host_wait(buffer.sent)
            buffer.slab.unpin()
        self._buffers.clear()

    def forget(self) -> None:
        """Let go of all units."""
        self._last.clear()

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self._send(order)
            except (RuntimeError, OSError, ValueError) as error:
                order.error = error
            finally:
                order.given.set()

    @torch.no_grad()
    def _send(self, order: _Order) -> None:
        layout, slot = order.unit.layout, order.slot
        homes = [home.reshape(-1).view(torch.uint8) for home in order.unit.homes]
        step = self._buffers[0].slab.tensor.numel()
        for start in range(0, layout.num_bytes, step):
            end = min(start + step, layout.num_bytes)
            buffer = self._buffers[self._turn % NUM_BUFFERS]
            self._turn += 1
            self._lane.host_wait(buffer.sent)
            memory = buffer.slab.tensor[: end - start]
            for place, source in _pieces(layout, homes, start, end):
                memory[place : place + source.numel()].copy_(source)
            done = [buffer.sent, slot.ready] if end == layout.num_bytes else [buffer.sent]
            # `free` was recorded before the order was given.
            self._lane.copy(slot.memory[start:end], memory, after=slot.free, done=done)


def _pieces(layout: Layout, homes: Sequence[Tensor], start: int, end: int) -> Iterator[tuple[int, Tensor]]:
    """What of the tensors, flat uint8, lies between two places of a slab, and how far behind `start`."""
    for offset, home in zip(layout.offsets, homes, strict=True):
        first, last = max(start, offset), min(end, offset + home.numel())
        if first < last:
            yield first - start, home[first - offset : last - offset]
