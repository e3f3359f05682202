"""Tensors packed behind each other in one stretch of memory: what is copied to the device in one go.

A slab is a flat uint8 tensor. Every group of tensors starts at a multiple of 256 bytes; the tensors of one
group follow each other without a gap, so that queries, keys and values stay one matrix product.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256


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


def layout_of(groups: Sequence[Sequence[Spec]]) -> Layout:
    """Pack groups of tensors, in order."""
    specs: list[Spec] = []
    offsets: list[int] = []
    end = 0
    for group in groups:
        end = aligned(end)
        for spec in group:
            if end % spec.dtype.itemsize:  # only in a group of mixed types
                end = aligned(end)
            specs.append(spec)
            offsets.append(end)
            end += spec.num_bytes
    return Layout(tuple(specs), tuple(offsets), aligned(end))


def aligned(num_bytes: int) -> int:
    """The next multiple of 256."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
