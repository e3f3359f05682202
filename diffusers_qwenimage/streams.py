"""Work beside the current stream of a GPU.

    with side:
        ...
    side.join()

Memory is safe because work runs there only between entering and joining, and waits at entering for all that
the current stream was given before. Who enters keeps what the side reads alive until it joins, and what it
made alive until the current stream has read it.
"""

import threading
from typing import Any

import torch


class Side:
    """A second stream of one device, with the events that order the two."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._entered = torch.cuda.Event()
        self._left = torch.cuda.Event()
        self._outer = torch.cuda.current_stream(device)

    def __enter__(self) -> None:
        self._outer = torch.cuda.current_stream(self._stream.device)
        self._entered.record(self._outer)
        self._stream.wait_event(self._entered)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: Any) -> None:
        self._left.record(self._stream)
        torch.cuda.set_stream(self._outer)

    def join(self) -> None:
        """Let the stream that was left at entering wait for the work."""
        self._outer.wait_event(self._left)

    def join_recorded(self) -> None:
        """See the function."""
        current = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            is_recorded = torch.cuda.is_current_stream_capturing()
        if is_recorded:
            current.wait_stream(self._stream)


class NoSide:
    """The same on the current stream: one thing after the other."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

    def join(self) -> None:
        """Nothing to wait for."""


_NO_SIDE = NoSide()
_of_thread = threading.local()  # two threads must not share the events


def side_of(device: torch.device, purpose: str, *, wanted: bool) -> Side | NoSide:
    """The side stream of this thread for a purpose; none off CUDA or on another than the current device.

    Setting the stream of another device would also change the current device.
    """
    if not wanted or device.type != "cuda" or device.index != torch.cuda.current_device():
        return _NO_SIDE
    sides: dict[tuple[int, str], Side] = _of_thread.__dict__.setdefault("sides", {})
    key = (device.index, purpose)
    side = sides.get(key)
    if side is None:
        side = sides[key] = Side(device)
    return side


def join_recorded() -> None:
    """After an error in the recording of a graph: let the current stream wait for this thread's side streams
    that belong to it, without which the recording cannot be ended."""
    sides: dict[tuple[int, str], Side] = _of_thread.__dict__.get("sides", {})
    for (index, _), side in sides.items():
        if index == torch.cuda.current_device():
            side.join_recorded()
