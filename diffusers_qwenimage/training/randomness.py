"""Random numbers that depend on nothing drawn before, so that a resumed run repeats the uninterrupted one.

Every number comes from a generator seeded with (seed, stream, counter). The counter is an epoch, or the
position of a sample among all samples of the run, over all ranks and accumulated batches; so the numbers do
not depend on how samples are spread over processes either.
"""

from enum import IntEnum

import torch

PRIME = 1_000_003


class Stream(IntEnum):
    """What a random number is for; streams do not overlap."""

    ORDER = 1
    NOISE = 2
    DROPOUT = 3
    CAPTION = 4
    SHUFFLE = 5
    INITIAL = 6
    VALIDATION = 7


def seed_for(seed: int, stream: Stream, counter: int) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    return ((seed * PRIME + int(stream)) * PRIME**2 + counter) % 2**63


def generator(seed: int, stream: Stream, counter: int) -> torch.Generator:
    """A CPU generator for one counter of a stream."""
    return torch.Generator().manual_seed(seed_for(seed, stream, counter))
