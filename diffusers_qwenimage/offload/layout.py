"""Tensors packed behind each other in one stretch of memory: what is copied to the device in one go.

A slab is a flat uint8 tensor. Every group of tensors starts at a multiple of 256 bytes; the tensors of one
group follow each other without a gap, so that queries, keys and values stay one matrix product. Large groups
start at a page, so that a slab can be pinned piece by piece with no tensor in two pieces: a copy of such a
tensor would be refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256
PAGE = 4096
LARGE = 2**20  # bytes of a group that starts at a page


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """A stretch of a slab.

    Attributes:
        start, end: in bytes.
        tensors: which lie in it, by their index.
    """

    start: int
    end: int
    tensors: range


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a slab lies.

    Attributes:
        specs: the tensors in order.
        offsets: of each, in bytes.
        num_bytes: of the slab, a multiple of 256.
    """

    specs: tuple[Spec, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    def views(self, slab: Tensor) -> list[Tensor]:
        """The tensors as parts of a slab of at least `num_bytes`."""
        with torch.inference_mode(False):
            return [
                slab[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
                for spec, offset in zip(self.specs, self.offsets, strict=True)
            ]

    def parts(self, least: int) -> list[Part]:
        """The slab cut at pages, with every tensor whole, into parts of `least` bytes or a little more."""
        parts: list[Part] = []
        start, first = 0, 0
        for index, offset in enumerate((*self.offsets[1:], self.num_bytes), start=1):
            is_last = index == len(self.specs)
            if is_last or (offset - start >= least and offset % PAGE == 0):
                parts.append(Part(start, offset, range(first, index)))
                start, first = offset, index
        return parts


def layout_of(groups: Sequence[Sequence[Spec]]) -> Layout:
    """Pack groups of tensors, in order."""
    specs: list[Spec] = []
    offsets: list[int] = []
    end = 0
    for group in groups:
        is_large = sum(spec.num_bytes for spec in group) >= LARGE
        end = _next(end, PAGE if is_large else ALIGNMENT)
        for spec in group:
            if end % spec.dtype.itemsize:  # only in a group of mixed types
                end = aligned(end)
            specs.append(spec)
            offsets.append(end)
            end += spec.num_bytes
    return Layout(tuple(specs), tuple(offsets), aligned(end))


def aligned(num_bytes: int) -> int:
    """The next multiple of 256."""
    return _next(num_bytes, ALIGNMENT)


def _next(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
