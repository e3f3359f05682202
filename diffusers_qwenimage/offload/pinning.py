"""Pinning in the background: weights are used from their files at once, and from pinned memory later.

Pinning takes several times as long as reading. So what streams may be left in mapped files at first, and a
thread copies it to pinned memory block by block while the module works. Who runs the module takes over, just
before a visit, what was done by then: tensors change their place between visits only, in the thread that
uses them, and the results are the same all the while.

While memory is being pinned, the device takes no work from other threads. So blocks are copied and pinned in
small parts, one after the other: a wait is short, and every second stretch of time is free.
"""

import atexit
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .memory import HostMemory, HostSlab
from .ring import Unit, sample

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20  # about 10 ms of pinning
WORKERS = 8  # while somebody waits for it


class Pinner:
    """A thread that pins the weights of one module after the other.

    What is added last is pinned first, and its second pass begins the work: the first one is when somebody
    waits.
    """

    def __init__(self) -> None:
        self._modules: list[weakref.ref[LatePinning]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, module: "LatePinning") -> None:
        """Let this module be the next."""
        with self._lock:
            self._modules.insert(0, weakref.ref(module))

    def begin(self, module: "LatePinning") -> None:
        """Start to work, if this module is the first and there is something to do."""
        with self._lock:
            if self._thread is None and self._next() is module:
                self._thread = threading.Thread(target=self._work, name="pinning", daemon=True)
                atexit.register(self.stop)
                self._thread.start()

    def stop(self) -> None:
        """Do nothing more; the rest stays where it is."""
        with self._lock:
            self._modules.clear()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                module = self._next()
                if module is None:
                    self._thread = None
                    atexit.unregister(self.stop)
                    return
            module.pin_next()
            del module  # it may go meanwhile

    def _next(self) -> "LatePinning | None":
        for reference in self._modules:
            module = reference()
            if module is not None and module.is_waiting:
                return module
        return None


class LatePinning:
    """Moves the units of one module to pinned memory.

    Args:
        units: of the module; those without a slab are moved.
        memory: where slabs come from.
        pinner: whose thread does the work.
        when_done: called when all units are pinned, by the thread that uses the module.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        memory: HostMemory,
        pinner: Pinner,
        *,
        when_done: Callable[[], None],
    ) -> None:
        self._units = units
        self._memory = memory
        self._pinner = pinner
        self._when_done = when_done
        self._state = threading.Condition()
        self._left = [index for index, unit in enumerate(units) if unit.slab is None]
        self._filled: dict[int, HostSlab] = {}
        self._at_work = 0
        self._changed: set[int] = set()
        self._last_visited: int | None = None
        pinner.add(self)

    @property
    def is_waiting(self) -> bool:
        """Whether there are units that nobody has begun to pin."""
        with self._state:
            return bool(self._left)

    @property
    def ready_bytes(self) -> int:
        """What is pinned and waits for its tensors, which come before the next visit."""
        with self._state:
            return sum(slab.tensor.numel() for slab in self._filled.values())

    # --- by the thread that uses the module, while no unit is visited ---

    def visit(self, index: int) -> None:
        """A unit is about to be visited."""
        self.take()
        if self._last_visited is not None and index <= self._last_visited:
            self._pinner.begin(self)
        self._last_visited = index

    def rest(self) -> None:
        """The module will not be used for a while."""
        self.take()
        if self._last_visited is not None:
            self._pinner.begin(self)

    def take(self) -> None:
        """Move tensors to the pinned memory that is ready for them."""
        with self._state:
            filled, self._filled = self._filled, {}
        for index, slab in filled.items():
            _move(self._units[index], slab, has_changed=index in self._changed)
        if filled and all(unit.slab is not None for unit in self._units):
            self._when_done()

    def will_change(self, index: int) -> None:
        """The tensors of a unit are changed at home: what has been copied so far is of no use."""
        self._changed.add(index)

    def finish(self) -> None:
        """Wait until everything is pinned, with several threads."""
        ended = threading.Event()

        def work(_: int) -> None:
            while not ended.is_set() and self.pin_next():
                pass

        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(work, range(WORKERS)))
        finally:
            ended.set()
        self._wait()
        self.take()

    def stop(self) -> None:
        """Pin no more units than those that are begun; the others stay where they are."""
        with self._state:
            self._left.clear()
        self._wait()
        self.take()

    def _wait(self) -> None:
        with self._state:
            while self._at_work:
                self._state.wait()

    # --- by any thread ---

    def pin_next(self) -> bool:
        """Copy a unit to pinned memory; False if there is none. What fails is left in its file, and told."""
        with self._state:
            if not self._left:
                return False
            index = self._left.pop(0)
            self._at_work += 1
        slab = None
        try:
            slab = _pinned_copy(self._units[index], self._memory)
        except (MemoryError, RuntimeError, OSError) as error:
            logger.warning(
                "No more host memory can be pinned (%s): %d blocks that stream stay in their files, from "
                "where they come slower.",
                *(error, len(self._left) + 1),
            )
        with self._state:
            self._at_work -= 1
            if slab is not None:
                self._filled[index] = slab
            else:
                self._left.clear()
            self._state.notify_all()
        return slab is not None


@torch.no_grad()
def _pinned_copy(unit: Unit, memory: HostMemory) -> HostSlab:
    """A slab with the unit's tensors; one thread copies, since the others have work to do.

    Raises:
        MemoryError, RuntimeError, OSError: if there is no such memory.
    """
    slab = memory.slab(unit.layout.num_bytes)
    views, how, is_pinned = unit.layout.views(slab.tensor), memory.how, True
    parts = unit.layout.parts(PART_BYTES)
    for part in parts:
        for index in part.tensors:
            np.copyto(_bytes_of(views[index]), _bytes_of(unit.homes[index]))
        is_pinned = is_pinned and memory.pin_part(slab, part.start, part.end)
    if is_pinned:
        slab.parts = [(part.start, part.end) for part in parts]
        return slab
    slab.unpin()
    slab = memory.pin(slab)
    if memory.how == "pageable" != how:
        raise RuntimeError("the system does not let us")
    return slab


def _bytes_of(tensor: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


@torch.no_grad()
def _move(unit: Unit, slab: HostSlab, *, has_changed: bool) -> None:
    homes = unit.layout.views(slab.tensor)
    for home, before in zip(homes, unit.homes, strict=True):
        # Changes that nobody told us of are looked for as in the ring.
        if has_changed or not torch.equal(sample(home), sample(before)):
            home.copy_(before)
    for member, home, before in zip(unit.members, homes, unit.homes, strict=True):
        tensor = member.tensor
        if tensor.data_ptr() == before.data_ptr() and tensor.device == before.device:  # else it was replaced
            tensor.data = home
    unit.homes, unit.slab = homes, slab
