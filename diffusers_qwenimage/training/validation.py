"""Validation pictures: prompts rendered with the weights as they are."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.denoise import DenoiseInputs, denoise
from diffusers_qwenimage.images import save_image
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

from .cache import Encoders
from .config import SIDE, TrainConfig
from .logs import SAMPLES, picture_grid
from .models import ModelFiles
from .randomness import Stream, generator

NEGATIVE = " "  # what guidance leads away from, as published examples have it


class Validation:
    """The prompts of a run, encoded once unless the text encoder is trained, and their pictures."""

    def __init__(self, config: TrainConfig, encoders: Encoders, files: ModelFiles) -> None:
        self.config = config
        self.files = files
        self._encode(encoders.embeds)

    def render(self, step: int, transformer: Any, encoders: Encoders, *, save: bool = True) -> Path:
        """Render all prompts with the weights of `transformer` and save them as a grid; returns its path."""
        if "text_encoder" in self.config.trained_models:
            self._encode(encoders.encode_text)
        pictures = render(
            transformer,
            encoders.vae,
            self.files.load_scheduler(),
            self.embeds,
            self.negative,
            self.config,
            device=encoders.device,
            dtype=encoders.dtype,
        )
        path = Path(self.config.output_path) / SAMPLES / f"step-{step}.png"
        if save:
            save_image(picture_grid([(f"step {step}", pictures)], self.config.validation_prompts), path)
        return path

    def _encode(self, encode: Callable[[str], Tensor]) -> None:
        self.embeds = [encode(text) for text in self.config.validation_prompts]
        self.negative = encode(NEGATIVE)


@torch.no_grad()
def render(
    transformer: Any,
    vae: Any,
    scheduler: Any,
    embeds: Sequence[Tensor],
    negative: Tensor,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Image.Image]:
    """One picture per prompt, each with its own noise, the same at every validation.

    Args:
        transformer, vae, scheduler: the models.
        embeds: of the prompts, [T_i, width].
        negative: of `NEGATIVE`, [T, width].
        config: sizes, steps and guidance of the pictures.
        device, dtype: what is computed on and in.
    """
    width, height = validation_size(config)
    rows, columns = height // SIDE, width // SIDE
    training = transformer.training
    transformer.eval()
    pictures = []
    for index, prompt in enumerate(embeds):
        noise = packing.initial_noise(
            1,
            transformer.config.in_channels // packing.PATCH**2,
            rows,
            columns,
            generator=generator(config.seed, Stream.VALIDATION, index),
            device=device,
            dtype=dtype,
        )
        sigmas = even_sigmas(config.validation_inference_steps)
        inputs = DenoiseInputs(
            latents=noise,
            timesteps=set_timesteps(scheduler, sigmas, num_tokens=rows * columns, device=device),
            prompt=[prompt.to(device, dtype)],
            negative=[negative.to(device, dtype)] if config.validation_cfg > 1 else None,
            guidance_scale=config.validation_cfg,
            image_shapes=[(1, rows, columns)],
        )
        pixels = packing.decode(vae, denoise(transformer, scheduler, inputs), rows, columns)
        pictures += VaeImageProcessor().postprocess(pixels.float(), output_type="pil")
    transformer.train(training)
    return pictures


def validation_size(config: TrainConfig) -> tuple[int, int]:
    """(width, height) of validation pictures."""
    if config.width is not None and config.height is not None:
        return config.width, config.height
    return config.validation_size, config.validation_size
