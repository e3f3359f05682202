"""What a process does while something runs: memory on the host and on the device, and where its time goes."""

import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Self

import torch


class Watch(ABC):
    """Looks again and again, from a thread of its own, between `with` and the end of it."""

    interval = 0.02  # s

    def __enter__(self) -> Self:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    @abstractmethod
    def look(self) -> None:
        """Note how things are now."""

    def _work(self) -> None:
        while not self._end.wait(self.interval):
            self.look()


class HostWatch(Watch):
    """The most memory of its own that the process has had; pages of mapped files can be dropped.

    Attributes:
        most: bytes.
    """

    def __init__(self) -> None:
        self.most = 0

    def look(self) -> None:
        """Read it from the system."""
        self.most = max(self.most, own_memory())


class DeviceWatch(Watch):
    """The most memory in use on a GPU, by anybody, CUDA's context included.

    Attributes:
        most: bytes.
    """

    interval = 0.01

    def __init__(self) -> None:
        self.most = 0
        self._lately = 0

    def look(self) -> None:
        """Ask the driver."""
        free, total = torch.cuda.mem_get_info()
        self._lately = max(self._lately, total - free)
        self.most = max(self.most, self._lately)

    def most_lately(self) -> int:
        """The most since this was asked before."""
        most, self._lately = self._lately, 0
        return most


class StackWatch(Watch):
    """How often each function was seen on the main thread's stack: where its time goes, at little cost.

    Our own functions are also counted on the stacks of other threads, under the names of these.
    """

    interval = 0.01

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._looks = 0

    def look(self) -> None:
        """Walk up the stacks."""
        threads = {thread.ident: thread for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            thread = threads.get(ident)
            if thread is threading.main_thread():
                self._seen.update(_names(frame))
            elif thread is not None:
                ours = _names(frame, inside="diffusers_qwenimage")
                self._seen.update(f"{thread.name.split('_')[0]} {name}" for name in ours)
        self._looks += 1

    def lines(self, count: int = 30) -> list[str]:
        """The functions that were seen most, with the share of all looks."""
        return [f"{100 * seen / self._looks:5.1f} %  {name}" for name, seen in self._seen.most_common(count)]


def _names(frame: FrameType | None, inside: str = "") -> set[str]:
    """Functions of a stack whose file has `inside` in its path."""
    names = set()
    while frame is not None:
        code = frame.f_code
        if inside in code.co_filename:
            names.add(f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_name}")
        frame = frame.f_back
    return names


def own_memory() -> int:
    """Bytes of the process that are no pages of files (files in /dev/shm included)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
