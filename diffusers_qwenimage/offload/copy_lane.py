"""How bytes get to the device beside its work: a stream of its own, ordered by events.

A mark is a point in the work of a device. A copy starts after a mark and makes one when it is done; work
waits for a mark. On a device that does as it is told at once (the CPU) marks are empty, and the same code
runs there.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Mark = Any  # a CUDA event, or None


class Lane(Protocol):
    """Copies to one device, in the order in which they are given."""

    def mark(self) -> Mark:
        """A mark to use again and again."""

    def copy(self, target: Tensor, source: Tensor, *, after: Mark, done: Sequence[Mark]) -> None:
        """Copy when `after` is reached, then reach all of `done`."""

    def reach(self, mark: Mark) -> None:
        """Let the mark be reached when the work given so far is done."""

    def wait(self, mark: Mark) -> None:
        """Let the work given from now on wait for the mark."""

    def host_wait(self, mark: Mark) -> None:
        """Wait here. Never called by a thread that gives work to the device."""

    def drain(self) -> None:
        """Wait until nothing is copied or computed any more: before memory is given back."""


class DirectLane:
    """For devices without streams: everything happens at once."""

    def mark(self) -> Mark:
        """Nothing."""
        return None

    def copy(self, target: Tensor, source: Tensor, *, after: Mark, done: Sequence[Mark]) -> None:
        """Copy now."""
        target.copy_(source)

    def reach(self, mark: Mark) -> None:
        """Nothing to do."""

    def wait(self, mark: Mark) -> None:
        """Nothing to do."""

    def host_wait(self, mark: Mark) -> None:
        """Nothing to do."""

    def drain(self) -> None:
        """Nothing to do."""


class CudaLane:
    """Copies on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream of the copies."""
        return self._stream

    def mark(self) -> Mark:
        """An event."""
        return torch.cuda.Event()

    def copy(self, target: Tensor, source: Tensor, *, after: Mark, done: Sequence[Mark]) -> None:
        """Copy on the stream; from pinned memory the call returns at once."""
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        for mark in done:
            mark.record(self._stream)

    def reach(self, mark: Mark) -> None:
        """Record the event on the current stream."""
        mark.record(torch.cuda.current_stream(self._device))

    def wait(self, mark: Mark) -> None:
        """The current stream waits for the event."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def host_wait(self, mark: Mark) -> None:
        """This thread waits for the event."""
        mark.synchronize()

    def drain(self) -> None:
        """Synchronise the device."""
        torch.cuda.synchronize(self._device)


def lane_to(device: torch.device) -> Lane:
    """The lane for a device."""
    return CudaLane(device) if device.type == "cuda" else DirectLane()
