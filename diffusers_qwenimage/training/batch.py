"""What a training step needs of the data, as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one forward.

    Attributes:
        clean, noise: packed latents [B, L, C], fp32.
        sigma: noise levels [B], fp32, as the model gets them.
        prompt: embeddings [T_i, width] of each sample.
        sigma_on_host: the same levels on the CPU, for whoever looks something up by them.
        grid: rows and columns of tokens.
        names: of the samples.
        counter: position of the first sample in the run, which seeds dropout.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    prompt: Sequence[Tensor]
    sigma_on_host: Tensor
    grid: tuple[int, int]
    names: tuple[str, ...]
    counter: int

    @property
    def shape(self) -> tuple[object, ...]:
        """What batches must have in common to be computed by one recording."""
        return tuple(self.clean.shape), tuple(text.shape[0] for text in self.prompt), self.grid

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with other tensors, but for `sigma_on_host`."""
        return replace(
            self,
            clean=change(self.clean),
            noise=change(self.noise),
            sigma=change(self.sigma),
            prompt=[change(text) for text in self.prompt],
        )

    def to(self, device: torch.device) -> "Batch":
        """On a device; from pinned memory nobody waits."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def copy_(self, other: "Batch") -> None:
        """Take over the values of a batch of the same shape."""
        pairs = [(self.clean, other.clean), (self.noise, other.noise), (self.sigma, other.sigma)]
        for here, there in [*pairs, *zip(self.prompt, other.prompt, strict=True)]:
            here.copy_(there, non_blocking=True)
