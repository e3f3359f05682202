"""A streamed module inside of a CUDA graph: the graph holds the copies too.

A recording must not depend on what the slots held before, nor on events from outside. So it starts with
empty slots and new marks, forks the lane's stream off the recording one, and joins it at the end. A replay
writes to the slots: before it, copies that are under way must arrive; after it, nobody may believe what the
slots held, nor write to them before the replay is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .copy_lane import CudaLane
from .state import Streaming, state_of


@contextmanager
def recording(module: nn.Module) -> Iterator[None]:
    """Around what is recorded, within `torch.cuda.graph`; does nothing for a module that does not stream."""
    state = state_of(module)
    if state is None:
        yield
        return
    lane = _cuda_lane(state)
    state.settle()
    state.forget()
    state.recorded_with = state.num_changed
    lane.stream.wait_stream(torch.cuda.current_stream(state.device))
    try:
        yield
    finally:
        state.settle()
        torch.cuda.current_stream(state.device).wait_stream(lane.stream)
        state.forget()


@contextmanager
def replaying(module: nn.Module) -> Iterator[None]:
    """Around the replay of what was recorded with `recording`.

    Raises:
        ValueError: if weights that were copied packed have changed since: the recording copies the old ones.
    """
    state = state_of(module)
    if state is None:
        yield
        return
    lane = _cuda_lane(state)
    if state.num_changed != state.recorded_with:
        raise ValueError("Streamed weights have changed since steps were recorded; record them again.")
    state.settle()
    torch.cuda.current_stream(state.device).wait_stream(lane.stream)
    try:
        yield
    finally:
        state.forget()
        for slot in state.slots:
            lane.reach(slot.free)


def _cuda_lane(state: Streaming) -> CudaLane:
    if not isinstance(state.lane, CudaLane):
        raise ValueError(f"The module streams to {state.device}; only on CUDA there is something to record.")
    return state.lane
