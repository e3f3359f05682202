"""Latents: the only file that knows VAE statistics, packing and initial noise.

Packed latents are [B, L, 4 z]: a token holds a square of 2x2 latent pixels, so L = (height / 16) (width / 16)
with the published VAE. z is the number of latent channels. Unpacked latents are [B, z, frames, height / 8,
width / 8].
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .precompile import compile_autoencoder, finish

PATCH = 2  # side of the square of latent pixels that a token holds
Generators = torch.Generator | list[torch.Generator] | None


def pack(latents: Tensor) -> Tensor:
    """[B, z, H, W] -> [B, (H/2) (W/2), 4 z]."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(
        batch, (height // PATCH) * (width // PATCH), channels * PATCH * PATCH
    )


def unpack(latents: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows * columns, 4 z] -> [B, z, 1, 2 rows, 2 columns]."""
    batch, _, channels = latents.shape
    squares = latents.reshape(batch, rows, columns, channels // (PATCH * PATCH), PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(
        batch, channels // (PATCH * PATCH), 1, rows * PATCH, columns * PATCH
    )


def token_grid(vae_scale_factor: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture of `height` x `width` pixels; remainders are cut off."""
    side = vae_scale_factor * PATCH
    return height // side, width // side


def initial_noise(
    batch: int,
    channels: int,
    rows: int,
    columns: int,
    *,
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Packed Gaussian noise [B, rows * columns, 4 channels], drawn in diffusers' order.

    A list of generators gives each sample its own; a CPU generator draws on the CPU for any device.

    Raises:
        ValueError: if there are neither one generator nor as many as samples.
    """
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"Got {len(generator)} generators for {batch} pictures. Give one, or one for each.")
    shape = (batch, 1, channels, rows * PATCH, columns * PATCH)
    return pack(randn_tensor(shape, generator=generator, device=device, dtype=dtype)[:, 0])


def encode(vae: Any, pixels: Tensor, *, generator: Generators = None, sample: bool = True) -> Tensor:
    """Pictures to normalised packed latents.

    Args:
        vae: an AutoencoderKLQwenImage.
        pixels: [B, 3, height, width] in [-1, 1], type and device of the VAE.
        generator: draws the posterior sample; one for all, or one per picture.
        sample: draw from the posterior; False takes its mode.

    Returns:
        [B, height / 16 * width / 16, 4 z].

    Raises:
        ValueError: if there are neither one generator nor as many as pictures.
    """
    if isinstance(generator, list):
        if len(generator) < pixels.shape[0]:
            raise ValueError(f"Got {len(generator)} generators for {pixels.shape[0]} pictures.")
        single = [_posterior(vae, pixels[i : i + 1], generator[i], sample) for i in range(pixels.shape[0])]
        raw = torch.cat(single)
    else:
        raw = _posterior(vae, pixels, generator, sample)
    mean, inverse_std = _statistics(vae, raw)
    return pack(((raw - mean) * inverse_std)[:, :, 0])


def decode(vae: Any, latents: Tensor, rows: int, columns: int) -> Tensor:
    """Normalised packed latents to pictures [B, 3, height, width] in [-1, 1]."""
    finish(compile_autoencoder(vae, latents.device))
    raw = unpack(latents, rows, columns).to(vae.dtype)
    mean, inverse_std = _statistics(vae, raw)
    pixels: Tensor = vae.decode(raw / inverse_std + mean, return_dict=False)[0]
    return pixels[:, :, 0]


def _posterior(vae: Any, pixels: Tensor, generator: torch.Generator | None, sample: bool) -> Tensor:
    finish(compile_autoencoder(vae, pixels.device))
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    raw: Tensor = posterior.sample(generator) if sample else posterior.mode()
    return raw


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation [1, z, 1, 1, 1] of the VAE's latents."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(like.device, like.dtype)
    # The inverse, since diffusers multiplies and divides by it: the same rounding.
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(like.device, like.dtype)
    return mean, inverse_std
