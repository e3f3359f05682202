"""The objective: flow matching (arXiv 2210.02747), by default exactly DiffSynth-Studio's.

With clean latents x, Gaussian noise e and the model's velocity v:

    x_sigma = (1 - sigma) x + sigma e
    loss    = w(sigma) mean((v(x_sigma, sigma, text) - (e - x))^2)       in fp32, then averaged over samples

Sampling of sigma
    reference     uniform over 1000 values: s_i = 1 - i / 1000, shifted (below), then stretched so that the
                  last one is 0.02: sigma_i = 1 - (1 - s_i) 0.98 / (1 - s_999). Their mean is 0.638.
    uniform       sigma = shifted u, u uniform in (0, 1)
    logit_normal  sigma = shifted sigmoid(mean + std n), n normal (arXiv 2403.03206)
Shift
    s' = e^mu / (e^mu + 1/s - 1); mu = 0.8 for reference, 0 (no shift) for the others, `timestep_shift` where
    given, or by the number of image tokens as in inference (`resolution_shift`).
Weights w
    reference     y = exp(-2 ((1000 sigma - 500) / 1000)^2); w = 1000 (y - min y) / sum(y - min y), minimum
                  and sum over the 1000 values. Mean 1, at most 1.68 (sigma = 0.5), 0 at sigma = 1.
    none          1
    min_snr       min(SNR, gamma) sigma^2, SNR = ((1 - sigma) / sigma)^2: what min-SNR (arXiv 2303.09556)
                  gives the error of x, since x - x_predicted = sigma (v - (e - x)).

The reference rounds the timestep to bf16 before it looks up sigma, which leaves 376 of the 1000 values; here
all are used, and the model gets the sigma that the latents were mixed with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_qwenimage.schedule import resolution_shift

from .config import TrainConfig

NUM_TIMESTEPS = 1000
REFERENCE_SHIFT = 0.8
SHIFT_TERMINAL = 0.02


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How sigmas are drawn and losses weighted.

    Attributes:
        config: the options of the objective.
        scheduler_config: of the model's scheduler, for the shift by resolution.
    """

    config: TrainConfig
    scheduler_config: Mapping[str, Any]

    def draw_sigma(self, num_tokens: int, generator: torch.Generator) -> Tensor:
        """One sigma, [1], fp32, for a picture of `num_tokens` image tokens."""
        kind = self.config.timestep_sampling
        if kind == "reference":
            index = torch.randint(NUM_TIMESTEPS, (1,), generator=generator)
            return reference_sigmas(self._mu(num_tokens))[index]
        if kind == "uniform":
            sigma = torch.rand(1, generator=generator)
        else:
            normal = torch.randn(1, generator=generator)
            sigma = torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
        return shift(sigma.clamp(1e-5, 1 - 1e-5), self._mu(num_tokens))

    def weight(self, sigma: Tensor) -> Tensor:
        """The weight of a sample at sigma, [B]."""
        if self.config.loss_weighting == "none":
            return torch.ones_like(sigma)
        if self.config.loss_weighting == "min_snr":
            snr = ((1 - sigma) / sigma).square()
            return snr.clamp(max=self.config.min_snr_gamma) * sigma.square()
        lowest, total = self._reference_bell
        return (bell(sigma) - lowest) * (NUM_TIMESTEPS / total)

    @cached_property
    def _reference_bell(self) -> tuple[float, float]:
        """Minimum of the bell over the reference's sigmas, and the sum above it."""
        values = bell(reference_sigmas(REFERENCE_SHIFT))
        lowest = float(values.min())
        return lowest, float((values - lowest).sum())

    def _mu(self, num_tokens: int) -> float:
        if self.config.resolution_shift:
            return resolution_shift(num_tokens, self.scheduler_config)
        if self.config.timestep_shift is not None:
            return self.config.timestep_shift
        return REFERENCE_SHIFT if self.config.timestep_sampling == "reference" else 0.0


def flow_matching_loss(
    transformer: Any,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    weight: Tensor,
    prompt: Sequence[Tensor],
    grid: tuple[int, int],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """The weighted loss of each sample, [B], fp32.

    Args:
        transformer: predicts velocities.
        clean, noise: packed latents [B, L, C], fp32.
        sigma, weight: [B], fp32.
        prompt: embeddings [T_i, width] of each sample.
        grid: rows and columns of tokens.
        dtype: what the model computes in.
    """
    level = sigma[:, None, None]
    noisy = (1 - level) * clean + level * noise
    velocity = transformer(
        hidden_states=noisy.to(dtype),
        encoder_hidden_states=[embeds.to(dtype) for embeds in prompt],
        timestep=sigma,
        img_shapes=[[(1, *grid)]] * len(clean),
        return_dict=False,
    )[0]
    error = velocity.float() - (noise - clean)
    loss: Tensor = weight * error.square().flatten(1).mean(dim=1)
    return loss


def reference_sigmas(mu: float) -> Tensor:
    """The 1000 sigmas of the reference, falling from 1 to 0.02, fp32."""
    shifted = shift(torch.linspace(1, 0, NUM_TIMESTEPS + 1, dtype=torch.float64)[:-1], mu)
    distance = 1 - shifted
    return (1 - distance * ((1 - SHIFT_TERMINAL) / distance[-1])).float()


def shift(sigma: Tensor, mu: float) -> Tensor:
    """The time shift of Stable Diffusion 3: towards 1 for a positive mu."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def bell(sigma: Tensor) -> Tensor:
    """exp(-2 (sigma - 0.5)^2), before it is brought to minimum 0 and mean 1."""
    return torch.exp(-2 * (sigma - 0.5).square())
