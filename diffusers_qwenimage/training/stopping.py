"""One run per output folder, and an orderly end on SIGTERM."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


class StopSignal:
    """Whether the process was asked to end."""

    def __init__(self) -> None:
        self.received = False

    def set(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        self.received = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """Note SIGTERM instead of dying of it; only the main thread can, elsewhere nothing is changed."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.set)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def output_lock(output: Path, *, held_by_us: bool) -> Iterator[None]:
    """Keep a second run out of the folder; the system frees the lock when a process dies.

    Raises:
        ValueError: if another run works in it.
    """
    if not held_by_us:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".training.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another run is training in {output}; take another output_path.") from error
    try:
        yield
    finally:
        lock.release()
