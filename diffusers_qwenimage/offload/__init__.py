"""Weights that do not fit on the device: streamed to it block by block, within a budget.

    plan = plan_stream(transformer, 8 * 2**30)      # what would stay and what would stream; touches nothing
    stream(transformer, device="cuda", vram_limit=8 * 2**30)
    unstream(transformer)

| file | subject |
|---|---|
| stream.py | `stream`, `unstream`, `streamed` |
| adopt.py | `adopt`: weights from files straight to where they will live |
| stored.py | whether weights are stored as they are used |
| empty.py | modules on the meta device: what their tensors shall be, and hanging them in |
| plan.py | what stays on the device and what streams, for a budget |
| survey.py | the blocks of a module, and the rest |
| state.py | a module that streams: placing weights, hooks, undoing both |
| placing.py | weights to where they will live |
| reading.py | bytes of files into memory, many tensors by one call |
| block_visits.py | what happens around the forward of a block |
| ring.py | slots on the device, and which block comes next |
| copy_lane.py | copies beside the work: a stream and events |
| mapped.py | weights that stay in a memory-mapped file |
| pinning.py | from mapped files to pinned memory, while the module works |
| one_visit.py | `passing`: modules that visit the device once |
| packed.py | bf16 weights that are copied in three quarters of their bytes |
| memory.py | pinned host memory without rounding |
| layout.py | tensors behind each other in one slab |
| recording.py | a streamed module inside of a CUDA graph |
| hooks.py | hooks below those of other programs |
"""

from .adopt import adopt
from .one_visit import passing
from .packed import pack_streamed
from .pinning import Pinner
from .plan import BlockPlan, Source, StreamPlan, Surveys, plan_stream, surveys_of
from .stream import (
    fetched_bytes,
    finish_pinning,
    pinned_bytes,
    rest,
    stream,
    streamed,
    unpinned_bytes,
    unstream,
)
from .survey import find_blocks

__all__ = [
    "BlockPlan",
    "Pinner",
    "Source",
    "StreamPlan",
    "Surveys",
    "adopt",
    "fetched_bytes",
    "find_blocks",
    "finish_pinning",
    "pack_streamed",
    "passing",
    "pinned_bytes",
    "plan_stream",
    "rest",
    "stream",
    "streamed",
    "surveys_of",
    "unpinned_bytes",
    "unstream",
]
