"""Image to image: start from a picture mixed with noise, at a later sigma."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import QwenImagePipelineOutput
from torch import Tensor

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.denoise import DenoiseInputs
from diffusers_qwenimage.images import ImageInput, prepare_images
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

from .base import CallbackOnStepEnd, QwenImagePipelineBase, seeded
from .calls import one_at_a_time
from .presets import with_preset
from .text import Text, guidance_interval
from .text_to_image import check_latents


class QwenImageImg2ImgPipeline(QwenImagePipelineBase):
    """Image to image with Qwen-Image; arguments and results are those of diffusers' pipeline of this name."""

    @one_at_a_time
    @with_preset
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 4.0,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: packing.Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        seed: int | None = None,
        cfg_start: float = 0.0,
        cfg_end: float = 1.0,
    ) -> QwenImagePipelineOutput | tuple[Any]:
        """Change pictures as prompts say. Arguments not listed here are those of `QwenImagePipeline`.

        Args:
            image: Pillow image, array [H, W, 3] or tensor [3, H, W], a batch or a list of them; or latents
                [B, z, H/8, W/8]. One serves all prompts; several go one to a prompt. They are resized to
                `height` x `width`.
            strength: in (0, 1]; that part of the steps is run. Near 0 the picture hardly changes.
            latents: packed latents to start from, already at the noise of the first step.
        """
        interval = guidance_interval(cfg_start, cfg_end)
        rows, columns = self._begin(
            height,
            width,
            guidance_scale,
            attention_kwargs,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        sigmas_before_shift = even_sigmas(num_inference_steps) if sigmas is None else sigmas
        text = self._encode_text(
            prompt,
            negative_prompt,
            true_cfg_scale,
            prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        inputs = prepare_image_to_image(
            text,
            rows,
            columns,
            image=image,
            strength=strength,
            vae=self.vae,
            processor=self.image_processor,
            scheduler=self.scheduler,
            sigmas=sigmas_before_shift,
            generator=seeded(generator, seed),
            latents=latents,
            attention_kwargs=attention_kwargs,
            device=self._execution_device,
        )
        return self._run(
            inputs,
            interval=interval,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )


def prepare_image_to_image(
    text: Text,
    rows: int,
    columns: int,
    *,
    image: ImageInput | None,
    strength: float,
    vae: Any,
    processor: VaeImageProcessor,
    scheduler: Any,
    sigmas: Sequence[float],
    generator: packing.Generators,
    latents: Tensor | None,
    attention_kwargs: dict[str, Any] | None,
    device: torch.device,
) -> DenoiseInputs:
    """Start from the picture at the noise level of the first step that `strength` leaves.

    Args:
        text: encoded prompts.
        rows, columns: of tokens.
        image: see the pipeline.
        strength: see the pipeline.
        vae: encodes the picture; a sample of its posterior, as in diffusers.
        processor: resizes pictures.
        scheduler: is given its timesteps, and mixes in the noise.
        sigmas: before the shift by resolution.
        generator: draws the posterior sample, then the noise.
        latents: packed latents to start from instead of the picture.
        attention_kwargs: for the transformer.
        device: of the latents.
    """
    timesteps = set_timesteps(scheduler, sigmas, num_tokens=rows * columns, device=device, strength=strength)
    if latents is None:
        clean, noise = clean_and_noise(text, rows, columns, image, vae, processor, generator, device)
        latents = scheduler.scale_noise(clean, timesteps[:1], noise)
    else:
        latents = check_latents(latents, text.num_pictures, rows * columns).to(device, text.dtype)
    return DenoiseInputs(
        latents=latents,
        timesteps=timesteps,
        prompt=text.prompt,
        negative=text.negative,
        guidance_scale=text.guidance_scale,
        image_shapes=[(1, rows, columns)],
        attention_kwargs=attention_kwargs or {},
    )


def clean_and_noise(
    text: Text,
    rows: int,
    columns: int,
    image: Any,
    vae: Any,
    processor: VaeImageProcessor,
    generator: packing.Generators,
    device: torch.device,
    **resize: Any,
) -> tuple[Tensor, Tensor]:
    """Packed latents of the pictures and noise, both [pictures, tokens, 4 z]; drawn in diffusers' order."""
    clean = encode_pictures(image, rows, columns, vae, processor, generator, device, **resize)
    clean = for_each_picture(clean.to(text.dtype), text, "image")
    noise = packing.initial_noise(
        text.num_pictures,
        vae.config.z_dim,
        rows,
        columns,
        generator=generator,
        device=device,
        dtype=text.dtype,
    )
    return clean, noise


def encode_pictures(
    image: Any,
    rows: int,
    columns: int,
    vae: Any,
    processor: VaeImageProcessor,
    generator: packing.Generators,
    device: torch.device,
    **resize: Any,
) -> Tensor:
    """Packed latents of pictures, or of latents [B, z, H/8, W/8] that the user passed.

    Raises:
        ValueError: if there is no picture, or latents of another size.
    """
    if image is None:
        raise ValueError("Give `image`, the picture to start from.")
    if isinstance(image, Tensor) and image.ndim in (4, 5) and image.shape[1] == vae.config.z_dim:
        latents = image[:, :, 0] if image.ndim == 5 else image
        if latents.shape[2:] != (rows * packing.PATCH, columns * packing.PATCH):
            raise ValueError(
                f"Latents passed as `image` must be {rows * packing.PATCH} x {columns * packing.PATCH}, "
                f"got {tuple(latents.shape)}."
            )
        return packing.pack(latents.to(device))
    side = processor.config.vae_scale_factor
    pictures = prepare_images(image, channels=vae.config.get("input_channels", 3), name="image")
    pixels = processor.preprocess(pictures, height=rows * side, width=columns * side, **resize)
    return packing.encode(vae, pixels.to(device, vae.dtype), generator=generator)


def for_each_picture(batch: Tensor, text: Text, name: str) -> Tensor:
    """Repeat a batch [1 or prompts or B, ...] so that there is one for each of B pictures.

    Raises:
        ValueError: if it has another length; `name` is the argument's, for the message.
    """
    if batch.shape[0] == text.num_pictures:
        return batch
    if batch.shape[0] == text.num_prompts:
        return batch.repeat_interleave(text.num_pictures // text.num_prompts, dim=0)
    if batch.shape[0] == 1:
        return batch.repeat_interleave(text.num_pictures, dim=0)
    raise ValueError(
        f"Got {batch.shape[0]} pictures as `{name}` for {text.num_prompts} prompts. Give one, or one each."
    )
