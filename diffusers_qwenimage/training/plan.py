"""In which order samples are seen, in which batches, with which captions; all a function of counters.

An epoch shuffles the samples (each `repeat` times), puts those of one size together into batches, shuffles
the batches, and fills up the last optimizer step with batches from its beginning. A step takes
`accumulation * world` batches: the batch `micro` of rank r is number `micro * world + r` of the step.
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .randomness import Stream, generator, seed_for

CAPTION_ORDERS = 8  # how many orders of its parts a shuffled caption has


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One sample of a batch: its index in the dataset, and its position among all samples of the run."""

    index: int
    counter: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The batches of all steps.

    Attributes:
        sizes: of each sample; those of one size can share a batch.
        repeat, batch_size, accumulation, world, seed: see `TrainConfig`; world is the number of processes.
    """

    sizes: Sequence[Hashable]
    repeat: int
    batch_size: int
    accumulation: int
    world: int
    seed: int
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        counts: dict[Hashable, int] = defaultdict(int)
        for size in self.sizes:
            counts[size] += self.repeat
        num_batches = sum(-(-count // self.batch_size) for count in counts.values())
        return -(-num_batches // (self.accumulation * self.world))

    def batch(self, step: int, micro: int, rank: int) -> list[Slot]:
        """The samples of one batch; steps count from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        number = (within * self.accumulation + micro) * self.world + rank
        overall = (step * self.accumulation + micro) * self.world + rank
        batches = self._epoch(epoch)
        return [
            Slot(index=index, counter=overall * self.batch_size + position)
            for position, index in enumerate(batches[number % len(batches)])
        ]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs.clear()  # one epoch at a time is kept
            self._epochs[epoch] = self._make_epoch(epoch)
        return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, Stream.ORDER, epoch)
        num_samples = len(self.sizes)
        order = (torch.randperm(num_samples * self.repeat, generator=draw) % num_samples).tolist()
        open_batches: dict[Hashable, list[int]] = defaultdict(list)
        batches = []
        for index in order:
            batch = open_batches[self.sizes[index]]
            batch.append(index)
            if len(batch) == self.batch_size:
                batches.append(open_batches.pop(self.sizes[index]))
        batches += [batch for batch in open_batches.values() if batch]
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What becomes of captions: see the options of these names."""

    prefix: str
    shuffle: bool
    dropout: float
    seed: int

    def text(self, caption: str, counter: int) -> str:
        """The caption of a sample at one position of the run."""
        draw = random.Random(seed_for(self.seed, Stream.CAPTION, counter))
        if draw.random() < self.dropout:
            return ""
        return self._variant(caption, draw.randrange(CAPTION_ORDERS) if self.shuffle else 0)

    def all_texts(self, caption: str) -> list[str]:
        """Every text that `text` may return for a caption."""
        numbers = range(CAPTION_ORDERS if self.shuffle else 1)
        texts = [self._variant(caption, number) for number in numbers]
        return list(dict.fromkeys([*texts, ""] if self.dropout else texts))

    def _variant(self, caption: str, number: int) -> str:
        if self.shuffle:
            parts = [part.strip() for part in caption.split(",")]
            random.Random(seed_for(self.seed, Stream.SHUFFLE, number)).shuffle(parts)
            caption = ", ".join(parts)
        return f"{self.prefix}{caption}"
