"""Bytes of files into memory: neighbours in a file by one call of the system.

Threads that read need Python's lock before and after each call, and wait for milliseconds where others
compute in Python meanwhile (kernels are compiled beside loading). So there are few calls, each of many bytes.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

MOST_VIEWS = 1024  # of one call (IOV_MAX of Linux and macOS)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes of a file, and where they go.

    Attributes:
        name: of the tensor that they are of.
        file: holds them.
        offset: of the first one in the file.
        memory: flat uint8, on any device.
    """

    name: str
    file: Path
    offset: int
    memory: Tensor

    @property
    def end(self) -> int:
        """Offset behind the last one."""
        return self.offset + self.memory.numel()


def cut(piece: Piece, most: int) -> list[Piece]:
    """The same in parts of at most `most` bytes."""
    parts, offset = [], piece.offset
    for memory in piece.memory.split(most):
        parts.append(Piece(name=piece.name, file=piece.file, offset=offset, memory=memory))
        offset += memory.numel()
    return parts


def runs_of(pieces: Iterable[Piece], most: int) -> list[list[Piece]]:
    """Pieces that follow each other in a file together, up to `most` bytes; in order of files and offsets."""
    runs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.offset)):
        if runs and _goes_on(runs[-1], piece, most):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _goes_on(run: Sequence[Piece], piece: Piece, most: int) -> bool:
    first, last = run[0], run[-1]
    return piece.file == last.file and piece.offset == last.end and piece.end - first.offset <= most


class Files:
    """Files that stay open, to be read by several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, file: Path, offset: int, memories: Sequence[Tensor]) -> None:
        """Fill host memory, one piece after the other, from `offset` on.

        Raises:
            ValueError: if the file ends before.
            OSError: if it cannot be read.
        """
        views = [memoryview(memory.numpy()) for memory in memories if memory.numel()]  # type: ignore[arg-type]
        while views:
            count = self._read_some(file, offset, views)
            if not count:
                raise ValueError(f"{file} ended while it was read. Fetch it again.")
            offset += count
            views = _behind(views, count)

    def _read_some(self, file: Path, offset: int, views: Sequence[memoryview]) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor(file), views[:MOST_VIEWS], offset)
        with file.open("rb", buffering=0) as opened:  # Windows
            opened.seek(offset)
            return opened.readinto(views[0]) or 0

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]


def _behind(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of views after the first `count` bytes."""
    left = []
    for view in views:
        if count < len(view):
            left.append(view[count:])
        count = max(0, count - len(view))
    return left
