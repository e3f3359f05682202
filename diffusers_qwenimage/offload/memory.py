"""Host memory that the device reads at full speed, and memory on the device.

Pinned memory of PyTorch is rounded up to a power of two (a slab of 450 MB takes 512). Here a slab is mapped
by itself, in large pages where the system has them, filled, and then registered with CUDA as it is, at once
or part by part. Where registering fails, PyTorch's pinned memory is taken; where that fails too, plain
memory, and the log says so.
"""

import logging
import mmap
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

How = Literal["registered", "allocated", "pageable"]


class HostSlab:
    """Flat host memory. Its pages are unpinned when the last tensor in it goes.

    Attributes:
        tensor: uint8.
        parts: (start, end) of what is copied at a time: a copy must not read two registered parts.
    """

    def __init__(self, num_bytes: int, *, how: How) -> None:
        """Memory of unknown content; pages are given by the system as they are filled.

        Raises:
            MemoryError: if there is not so much.
        """
        self._pages = _new_pages(num_bytes) if how == "registered" and num_bytes else None
        self.parts = [(0, num_bytes)]
        with torch.inference_mode(False):
            if self._pages is not None:
                self.tensor = torch.frombuffer(self._pages, dtype=torch.uint8)
            else:
                self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=how == "allocated")

    def register(self, parts: Sequence[tuple[int, int]] | None = None) -> bool:
        """Pin the memory, all of it or some more parts; False if the system does not let us."""
        if self._pages is None:
            return False
        address = self.tensor.data_ptr()
        return all(self._pages.register(address + start, end - start) for start, end in parts or self.parts)

    def unpin(self) -> None:
        """Give the pages back to the system's management. Nothing may be copying from them."""
        self.parts = [(0, self.tensor.numel())]
        if self._pages is not None:
            self._pages.unregister()


class HostMemory:
    """Where slabs for copies to one device come from.

    Attributes:
        how: "registered" with CUDA, "allocated" as pinned by PyTorch, or "pageable" (also without CUDA).
    """

    def __init__(self, device: torch.device) -> None:
        self.how: How = "registered" if device.type == "cuda" else "pageable"

    def slab(self, num_bytes: int) -> HostSlab:
        """Memory to fill, and then to `pin`."""
        return HostSlab(num_bytes, how=self.how)

    def pin_part(self, slab: HostSlab, start: int, end: int) -> bool:
        """Pin a part that begins and ends at a page and is filled; False if it must be pinned as a whole."""
        return self.how != "registered" or slab.register([(start, end)])

    def pin(self, slab: HostSlab) -> HostSlab:
        """The slab, pinned: itself, or a pinned copy where its memory cannot be registered."""
        if self.how != "registered" or slab.register() or not slab.tensor.numel():
            return slab
        try:
            copy = HostSlab(slab.tensor.numel(), how="allocated")
        except RuntimeError as error:
            self.how = "pageable"
            logger.warning("Host memory cannot be pinned (%s); copies to the device will be slow.", error)
            return slab
        self.how = "allocated"
        logger.info("Host memory cannot be registered with CUDA; PyTorch's pinned memory is used.")
        copy.tensor.copy_(slab.tensor)
        return copy


def device_slab(num_bytes: int, device: torch.device) -> Tensor:
    """Flat uint8 memory on the device."""
    with torch.inference_mode(False):
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)


class _Pages(mmap.mmap):
    """Private pages of the process that CUDA may know; it forgets them before they go."""

    _registered_at: tuple[int, ...] = ()

    def register(self, address: int, num_bytes: int) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)) != 0:
            _forget_error()
            return False
        self._registered_at += (address,)
        return True

    def unregister(self) -> None:
        addresses, self._registered_at = self._registered_at, ()
        for address in addresses:
            torch.cuda.cudart().cudaHostUnregister(address)

    def __del__(self) -> None:
        if self._registered_at and torch is not None:  # at the end of the process, CUDA is gone
            self.unregister()


def _forget_error() -> None:
    """The runtime reports a failed call again at the next kernel, where nobody expects it."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as error:
        logger.debug("Registering failed: %s", error)


def _new_pages(num_bytes: int) -> _Pages:
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return _Pages(-1, num_bytes)
    try:
        pages = _Pages(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes:,} bytes of host memory are not to be had: {error}.") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)  # a 512th of the page faults, and of the pages to pin
        except OSError as error:
            logger.debug("No large pages: %s", error)
    return pages
