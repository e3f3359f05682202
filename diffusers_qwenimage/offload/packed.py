"""Streamed weights that are copied packed: bf16 in three quarters of its bytes, without loss.

Where copying takes longer than computing, a step takes as long as its bytes. A packed copy of every block
waits in pinned memory, beside the weights themselves. Slots hold what was copied; a visit unpacks it into a
place that all blocks share, and the slot is free again.

A block whose weights are changed (a LoRA fused into them) is copied as it is from then on.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .layout import Layout
from .memory import HostMemory, HostSlab, device_slab
from .ring import PackedSlab, Unit
from .state import Streaming, state_of

logger = logging.getLogger(__name__)

LISTED = 256  # at most one word of so many may be an exception
WORKERS = 8  # slabs that are pinned at a time


class Workspace:
    """Where the weights of the block that works are unpacked.

    Args:
        memory: uint8 on the device, for the largest unit.

    Attributes:
        holds: the unit in it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.holds: int | None = None
        self._memory = memory
        self._num_bytes = memory.numel()
        self._views: dict[Layout, list[Tensor]] = {}

    def views(self, layout: Layout) -> list[Tensor]:
        """The tensors of a unit; made once."""
        if layout not in self._views:
            self._views[layout] = layout.views(self._memory)
        return self._views[layout]

    def unpack(self, index: int, unit: Unit, copy: Tensor) -> None:
        """Write the weights of a unit here, from a copy of its packed slab."""
        from diffusers_qwenimage.kernels.packing import unpack  # here, since it imports Triton

        assert unit.packed is not None
        if self._memory.numel() != self._num_bytes:
            self._memory = device_slab(self._num_bytes, self._memory.device)
        self.holds = None  # until it is done
        unpack(unit.packed.words, copy, self._words(unit))
        self.holds = index

    def pack(self, unit: Unit, slab: HostSlab) -> PackedSlab | None:
        """The weights of a unit, packed by way of this place; None if that would not make them smaller."""
        from diffusers_qwenimage.kernels.packing import pack

        memory = self._words(unit)
        memory.zero_()  # the gaps between tensors
        for view, home in zip(self.views(unit.layout), unit.homes, strict=True):
            view.copy_(home)
        words = pack(memory, slab.tensor)
        return None if words is None else PackedSlab(words=words, slab=slab, sample=unit.sample())

    def rest(self) -> None:
        """Give the memory back until the next visit. Nothing may be reading it."""
        self._memory, self.holds = self._memory.new_empty(0), None
        self._views.clear()

    def _words(self, unit: Unit) -> Tensor:
        return self._memory[: unit.layout.num_bytes].view(torch.int16)


@torch.no_grad()
def pack_streamed(module: nn.Module) -> int:
    """Copy the weights of a module that streams packed from now on, as far as they are bf16.

    One of its slots becomes the place where they are unpacked. Undone by `unstream`, and by `stream` with
    another budget. Nothing happens to a module that does not stream.

    Returns:
        Bytes that one pass through all blocks copies to the device.

    Raises:
        ValueError: if the module streams with fewer than two slots, or from mapped files.
        RuntimeError: during a visit to a block.
    """
    from diffusers_qwenimage.kernels.packing import packed_bytes

    state = state_of(module)
    if state is None:
        return 0
    if len(state.slots) < 2 or state.placement.plan.source != "pinned":
        raise ValueError(
            f"{type(module).__name__} streams from {state.placement.plan.source} memory with "
            f"{len(state.slots)} slot(s); packed weights need pinned memory and two slots. Raise vram_limit."
        )
    state.finish_pinning()
    memory = HostMemory(state.device)
    fitting = [unit for unit in state.units if _can_be_packed(unit)]

    def slab_for(unit: Unit) -> HostSlab:
        num_words = unit.layout.num_bytes // 2
        return memory.pin(memory.slab(packed_bytes(num_words, num_words // LISTED)))

    if fitting:
        workspace = Workspace(state.give_up_slot())
        with ThreadPoolExecutor(WORKERS if state.device.type == "cuda" else 1) as pool:
            for unit, slab in zip(fitting, pool.map(slab_for, fitting), strict=True):
                unit.packed = workspace.pack(unit, slab)
                if unit.packed is not None and unit.slab is not None:
                    unit.slab.unpin()
        state.use_workspace(workspace)
    _report(state)
    return sum(unit.sent_bytes for unit in state.units)


def _report(state: Streaming) -> None:
    packed = sum(unit.packed is not None for unit in state.units)
    logger.info("%d of %d blocks are copied packed.", packed, len(state.units))


def _can_be_packed(unit: Unit) -> bool:
    return all(spec.dtype == torch.bfloat16 for spec in unit.layout.specs)
