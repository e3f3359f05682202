"""Which sigmas are visited: the one schedule of inference and training.

A schedule is a falling list of sigmas in [0, 1]; timestep = 1000 sigma. Qwen-Image shifts it by resolution:
sigma' = e^mu / (e^mu + 1/sigma - 1), with mu linear in the number of image tokens (the time shift of Stable
Diffusion 3, arXiv 2403.03206, as diffusers' FlowMatchEulerDiscreteScheduler implements it), and then
stretches it so that it ends at `shift_terminal`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def resolution_shift(num_tokens: int, config: Mapping[str, Any]) -> float:
    """The shift mu for a picture of `num_tokens` image tokens, from a scheduler's config."""
    base_tokens = config.get("base_image_seq_len", 256)
    max_tokens = config.get("max_image_seq_len", 4096)
    base_shift = config.get("base_shift", 0.5)
    max_shift = config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(num_tokens * slope + (base_shift - slope * base_tokens))


def even_sigmas(num_steps: int, first: float = 1.0) -> list[float]:
    """`num_steps` evenly spaced sigmas, from `first` down to `first / num_steps`, before shifting.

    Raises:
        ValueError: if the number of steps is not a whole number of at least 1.
    """
    if num_steps < 1 or num_steps % 1:
        raise ValueError(f"num_inference_steps must be a whole number of at least 1, got {num_steps!r}.")
    sigmas: list[float] = np.linspace(first, first / num_steps, int(num_steps)).tolist()
    return sigmas


def set_timesteps(
    scheduler: Any,
    sigmas: Sequence[float],
    *,
    num_tokens: int,
    device: str | torch.device | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Give a scheduler its sigmas and return the timesteps to denoise at.

    Args:
        scheduler: a diffusers scheduler that takes sigmas.
        sigmas: before shifting.
        num_tokens: image tokens of the picture, for the resolution shift.
        device: of the timesteps.
        strength: in [0, 1]; the last `strength` part of the steps is run, as diffusers' image-to-image does.

    Raises:
        ValueError: if the scheduler takes no sigmas, or no step is left.
    """
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if "sigmas" not in accepted:
        raise ValueError(
            f"{type(scheduler).__name__} does not take sigmas. Use a flow-matching scheduler, such as "
            "FlowMatchEulerDiscreteScheduler."
        )
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}.")
    mu = {"mu": resolution_shift(num_tokens, scheduler.config)} if "mu" in accepted else {}
    if len(sigmas) == 1 and scheduler.config.get("shift_terminal"):
        _set_single_step(scheduler, float(sigmas[0]), device, **mu)
    else:
        scheduler.set_timesteps(sigmas=sigmas, device=device, **mu)
    num_steps = len(scheduler.timesteps) // scheduler.order
    first = int(max(num_steps - min(num_steps * strength, num_steps), 0))
    if first >= num_steps:
        raise ValueError(
            f"strength {strength} of {num_steps} steps leaves no step to run. "
            "Raise strength or num_inference_steps."
        )
    scheduler.set_begin_index(first * scheduler.order)
    timesteps: Tensor = scheduler.timesteps[first * scheduler.order :]
    return timesteps


def _set_single_step(
    scheduler: Any, sigma: float, device: str | torch.device | None, mu: float | None = None
) -> None:
    """One step from `sigma`, shifted, to 0. Stretching one sigma to the terminal divides zero by zero."""
    scheduler.set_timesteps(sigmas=[sigma, sigma / 2], device=device, **({} if mu is None else {"mu": mu}))
    if mu is not None and scheduler.config.get("use_dynamic_shifting"):
        sigma = float(scheduler.time_shift(mu, 1.0, np.float32(sigma)))
    scheduler.sigmas = torch.tensor([sigma, 0.0], dtype=torch.float32)
    scheduler.timesteps = torch.tensor([sigma], dtype=torch.float32, device=device) * 1000
    scheduler.num_inference_steps = 1
