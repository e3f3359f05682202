"""Run a module on a device that cannot hold all of its weights.

    plan = stream(transformer, vram_limit=8 * 2**30)
    ...                                     # use the module as before
    unstream(transformer)

The module's blocks keep a part of their weights on the device. The rest lies in pinned host memory, one piece
per block, and is copied to a ring of slots on the device while earlier blocks compute. Results are those of
the fully resident module, bit for bit. See plan.py for what stays, ring.py for the order of copies and
block_visits.py for what happens around a block.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from .pinning import Pinner
from .placing import place_existing
from .plan import Source, StreamPlan, Surveys, make_plan
from .state import Streaming, state_of


def stream(
    module: nn.Module,
    *,
    device: str | torch.device | None = None,
    vram_limit: int | None = None,
    blocks: Sequence[str] | None = None,
    on_call: Sequence[str] | None = None,
    source: Source = "pinned",
    num_slots: int | None = None,
    split: bool | None = None,
    surveys: Surveys | None = None,
    progress: Callable[[int, int], None] | None = None,
    pinner: Pinner | None = None,
) -> StreamPlan:
    """Stream the weights of a module's blocks to a device; again with another budget to plan anew.

    The weights of the blocks are frozen (`requires_grad_(False)`); adapters of PEFT, loaded before or after,
    stay on the device and can be trained, with gradient checkpointing.

    Args:
        module: a module with lists of blocks that run one after the other, its weights anywhere but on meta.
        device: where it computes; None: the GPU if there is one. On a CPU the same code runs with plain
            copies.
        vram_limit: bytes for the module's weights on the device, slots included; None: no limit.
        blocks: names of lists of blocks (`transformer_blocks`), or of blocks; None: every outermost
            `ModuleList` of two or more modules of one class.
        on_call: names of submodules, of the module or in its blocks, that stay in host memory and come to the
            device when they are called; None: those that the class names in `_stream_on_call` (for our
            transformer the modulation, which is tabulated). Large parts outside of the blocks (256 MiB) do so
            too when the module does not fit; of embeddings only the rows that are needed come.
        source: "pinned": weights are copied to pinned memory, once; "mapped": they stay where they are on the
            host, usually in a memory-mapped file, and pass through two pinned buffers.
        num_slots: places for blocks on the device; None: three, or fewer if the budget is small. With one,
            nothing is copied while a block computes.
        split: whether parts of blocks (the modules that they call) come and go instead of whole blocks, which
            takes a third of the memory and works without gradients only; None: where the budget is too small
            for two whole blocks.
        surveys: as in `plan_stream`.
        progress: called with (bytes done, bytes in all).
        pinner: pins what `adopt` left in mapped files for now; None: it is pinned here.

    Raises:
        ValueError: if the budget is too small, or the module cannot be streamed.
        MemoryError, torch.OutOfMemoryError: if there is not enough memory; the module is whole then, on the
            CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = device_of(device)
    before = state_of(module)
    if before is not None:
        before.settle()
    placement = make_plan(
        module,
        vram_limit,
        device=str(target),
        blocks=blocks,
        on_call=on_call,
        source=source,
        num_slots=num_slots,
        split=split,
        surveys=surveys,
    )
    units = {}
    if before is not None:
        units = before.disconnect()
        if target.type == "cuda":
            torch.cuda.empty_cache()  # else small slots would lie in a part of what held large ones
    place = partial(place_existing, units, may_wait=pinner is not None)
    Streaming(module, placement, target, pinner).start(place, progress)
    return placement.plan


def unstream(module: nn.Module, *, device: str | torch.device | None = "cpu") -> None:
    """Undo `stream`: hooks go, and all weights are on `device`. One that does not stream is left alone.

    Args:
        module: the module.
        device: where its weights go; None: they stay where they are, on the device and on the host.
    """
    state = state_of(module)
    if state is not None:
        state.stop()
        if device is not None:
            module.to(device)


def streamed(module: nn.Module) -> StreamPlan | None:
    """The plan of a module that streams; None if it does not."""
    state = state_of(module)
    return None if state is None else state.placement.plan


def rest(module: nn.Module) -> None:
    """Give the slots on the device back until the module is used again: other modules work meanwhile."""
    state = state_of(module)
    if state is not None:
        state.rest()


def fetched_bytes(module: nn.Module) -> int:
    """Bytes copied to the device for visits since `stream`; 0 if the module does not stream."""
    state = state_of(module)
    return 0 if state is None else state.fetched_bytes


def pinned_bytes(module: nn.Module) -> int:
    """Host memory that is pinned for a module now; 0 if it does not stream."""
    state = state_of(module)
    return 0 if state is None else state.pinned_bytes


def unpinned_bytes(module: nn.Module) -> int:
    """Bytes of a module that stream from mapped files until a `Pinner` has pinned them."""
    state = state_of(module)
    return 0 if state is None else state.unpinned_bytes


def finish_pinning(module: nn.Module) -> None:
    """Wait until what a `Pinner` is to pin is pinned. Does nothing for a module without such weights."""
    state = state_of(module)
    if state is not None:
        state.finish_pinning()


def device_of(device: str | torch.device) -> torch.device:
    """The device with its index ("cuda" is the current GPU)."""
    found = torch.device(device)
    with_index = found.type != "cuda" or ":" in str(found)
    return found if with_index else torch.device("cuda", torch.cuda.current_device())
