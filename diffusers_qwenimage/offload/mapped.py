"""Weights that stay in a memory-mapped file: a thread reads the next block into pinned memory and sends it
on.
"""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .copy_lane import Lane, Mark
from .memory import HostMemory, HostSlab
from .ring import Feeder, Slot, Unit

NUM_BUFFERS = 2


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
    """Fills slots through a few pinned buffers.

    Args:
        lane: copies from the buffers to the slots.
        units: what will be asked for, to size the buffers.
        device: where the slots are.
    """

    def __init__(self, lane: Lane, units: Sequence[Unit], device: torch.device) -> None:
        super().__init__(lane)
        memory = HostMemory(device)
        size = max(unit.layout.num_bytes for unit in units)
        self._buffers = [
            _Buffer(slab=memory.pin(memory.slab(size)), sent=lane.mark()) for _ in range(NUM_BUFFERS)
        ]
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._last: dict[int, _Order] = {}
        self._thread = threading.Thread(target=self._work, name="weights", daemon=True)
        self._thread.start()

    def start(self, unit: Unit, slot: Slot) -> None:
        """Ask the thread to fill a slot."""
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
        """Let the thread finish what was asked for, and end."""
        self._orders.put(None)
        self._thread.join()
        for buffer in self._buffers:
            buffer.slab.unpin()

    def _work(self) -> None:
        count = 0
        while (order := self._orders.get()) is not None:
            buffer = self._buffers[count % NUM_BUFFERS]
            count += 1
            try:
                self._send(order, buffer)
            except (RuntimeError, OSError, ValueError) as error:
                order.error = error
            finally:
                order.given.set()

    @torch.no_grad()
    def _send(self, order: _Order, buffer: _Buffer) -> None:
        size = order.unit.layout.num_bytes
        self._lane.host_wait(buffer.sent)
        memory = buffer.slab.tensor[:size]
        for view, home in zip(order.unit.layout.views(memory), order.unit.homes, strict=True):
            view.copy_(home)
        # `free` was recorded before the order was given.
        slot = order.slot
        self._lane.copy(slot.memory[:size], memory, after=slot.free, done=[slot.ready, buffer.sent])
