"""Batches of a run: from a place in its plan to tensors in host memory."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch
from .cache import Encoders
from .config import SIDE, TrainConfig
from .data import BadImage, Sample
from .objective import Objective
from .plan import Captions, Slot
from .randomness import Stream, generator

logger = logging.getLogger(__name__)


class Feed:
    """Makes batches. What a sample gets depends on its place in the run alone.

    Args:
        config: the run's options.
        samples: the dataset.
        encoders: latents and embeddings, from the cache or computed.
        objective: how noise levels are drawn.
        pin: put tensors into pinned memory, from which copies to a GPU keep nobody waiting.
    """

    def __init__(
        self,
        config: TrainConfig,
        samples: Sequence[Sample],
        encoders: Encoders,
        objective: Objective,
        *,
        pin: bool,
    ) -> None:
        self.config = config
        self.samples = samples
        self.encoders = encoders
        self.objective = objective
        self.captions = Captions(
            prefix=config.caption_prefix,
            shuffle=config.caption_shuffle,
            dropout=config.caption_dropout,
            seed=config.seed,
        )
        self._pin = pin
        self._reported: set[str] = set()
        self._ahead: tuple[list[Slot], Batch] | None = None

    def batch(self, slots: Sequence[Slot]) -> Batch:
        """The samples of `slots`, all of one size."""
        if self._ahead is not None and self._ahead[0] == list(slots):
            batch, self._ahead = self._ahead[1], None
            return batch
        samples = [self.samples[slot.index] for slot in slots]
        clean = torch.stack([self._latents(slot.index).float() for slot in slots])
        texts = [self.captions.text(s.caption, slot.counter) for s, slot in zip(samples, slots, strict=True)]
        draws = [generator(self.config.seed, Stream.NOISE, slot.counter) for slot in slots]
        sigma = torch.cat([self._sigma(slot, draw) for slot, draw in zip(slots, draws, strict=True)])
        batch = Batch(
            clean=clean,
            noise=torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]),
            sigma=sigma,
            prompt=[self._embeds(text) for text in texts],
            sigma_on_host=sigma,
            grid=samples[0].grid,
            names=tuple(sample.name for sample in samples),
            counter=slots[0].counter,
        )
        return batch.map(_pinned) if self._pin else batch

    def give_back(self, slots: Sequence[Slot], batch: Batch) -> None:
        """Let the next call of `batch` return this one."""
        self._ahead = (list(slots), batch)

    def prepare(self, slots: Sequence[Slot]) -> None:
        """Make the next batch while the device is busy; only if no weights are trained that it depends on."""
        if self.config.cache and self.config.trained_models == ("dit",):
            self._ahead = (list(slots), self.batch(slots))

    def sigmas(self, slots: Sequence[Slot]) -> Tensor:
        """The noise levels that `batch` will draw for these samples."""
        draws = [generator(self.config.seed, Stream.NOISE, slot.counter) for slot in slots]
        return torch.cat([self._sigma(slot, draw) for slot, draw in zip(slots, draws, strict=True)])

    def _sigma(self, slot: Slot, draw: torch.Generator) -> Tensor:
        """The noise level of a sample, [1]: the first number that is drawn for it."""
        width, height = self.samples[slot.index].size
        return self.objective.draw_sigma(width * height // SIDE**2, draw)

    def _latents(self, index: int) -> Tensor:
        """Latents of a sample; of the next one of its size if its picture went bad and that is allowed."""
        size, number = self.samples[index].size, len(self.samples)
        for distance in range(number):
            sample = self.samples[(index + distance) % number]
            if sample.size != size:
                continue
            try:
                if "vae" in self.config.trained_models:
                    return self.encoders.encode_picture(sample)
                return self.encoders.latents(sample)
            except BadImage as error:
                if self.config.on_bad_image == "error":
                    raise
                if sample.name not in self._reported:
                    self._reported.add(sample.name)
                    logger.warning("%s Another picture takes its place.", error)
        raise BadImage("No picture of this size can be read any more.")

    def _embeds(self, text: str) -> Tensor:
        if "text_encoder" in self.config.trained_models:
            return self.encoders.encode_text_with_gradients(text)
        return self.encoders.embeds(text)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
