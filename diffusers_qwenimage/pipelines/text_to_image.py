"""Text to image."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.qwenimage import QwenImagePipelineOutput
from torch import Tensor

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.denoise import DenoiseInputs
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

from .base import CallbackOnStepEnd, QwenImagePipelineBase, seeded
from .calls import one_at_a_time
from .presets import with_preset
from .text import Text, guidance_interval


class QwenImagePipeline(QwenImagePipelineBase):
    """Text to image with Qwen-Image; arguments and results are those of diffusers' QwenImagePipeline."""

    @one_at_a_time
    @with_preset
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
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
        """Make pictures from prompts.

        Args:
            prompt: what the picture shows; a list makes a batch, of any lengths.
            negative_prompt: what to guide away from. It switches guidance on; `" "` is enough.
            true_cfg_scale: strength of the guidance; acts above 1, with a negative prompt.
            height, width: in pixels, multiples of 16 (others are rounded down, with a warning).
            num_inference_steps: denoising steps, at least 1.
            sigmas: a schedule of one's own, before the shift by resolution.
            guidance_scale: for guidance-distilled models; has no effect.
            num_images_per_prompt: pictures of each prompt.
            generator: for the noise; a list has one per picture.
            latents: packed noise [pictures, tokens, channels] to start from instead.
            prompt_embeds, prompt_embeds_mask: from `encode_prompt`, instead of `prompt`.
            negative_prompt_embeds, negative_prompt_embeds_mask: likewise.
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent" (packed).
            return_dict: return an object with `.images` instead of a tuple.
            attention_kwargs: {"scale": s} scales the LoRA layers.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; returns a dict
                whose tensors replace those of the loop.
            callback_on_step_end_tensor_inputs: what it is given: "latents", "prompt_embeds".
            max_sequence_length: tokens kept of a prompt, at most 1024.
            seed: shorthand for a CPU generator with this seed; not together with `generator`.
            cfg_start, cfg_end: part of the steps in which guidance acts, as fractions; outside of it a step
                costs half and the negative prompt has no effect.

        Raises:
            ValueError: for arguments that contradict each other or cannot be met; the message says which.
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
        inputs = prepare_text_to_image(
            text,
            rows,
            columns,
            scheduler=self.scheduler,
            sigmas=sigmas_before_shift,
            num_channels=self.transformer.config.in_channels // packing.PATCH**2,
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


def prepare_text_to_image(
    text: Text,
    rows: int,
    columns: int,
    *,
    scheduler: Any,
    sigmas: Sequence[float],
    num_channels: int,
    generator: packing.Generators,
    latents: Tensor | None,
    attention_kwargs: dict[str, Any] | None,
    device: torch.device,
) -> DenoiseInputs:
    """Start from noise.

    Args:
        text: encoded prompts.
        rows, columns: of tokens.
        scheduler: is given its timesteps.
        sigmas: before the shift by resolution.
        num_channels: latent channels z.
        generator: draws the noise.
        latents: packed noise to start from instead.
        attention_kwargs: for the transformer.
        device: of the latents.
    """
    if latents is None:
        latents = packing.initial_noise(
            text.num_pictures,
            num_channels,
            rows,
            columns,
            generator=generator,
            device=device,
            dtype=text.dtype,
        )
    else:
        latents = check_latents(latents, text.num_pictures, rows * columns).to(device, text.dtype)
    return DenoiseInputs(
        latents=latents,
        timesteps=set_timesteps(scheduler, sigmas, num_tokens=rows * columns, device=device),
        prompt=text.prompt,
        negative=text.negative,
        guidance_scale=text.guidance_scale,
        image_shapes=[(1, rows, columns)],
        attention_kwargs=attention_kwargs or {},
    )


def check_latents(latents: Tensor, num_pictures: int, num_tokens: int) -> Tensor:
    """Latents that the user passed, if they fit the call.

    Raises:
        ValueError: if they are not packed, or for another number or size of pictures.
    """
    if latents.ndim != 3 or latents.shape[:2] != (num_pictures, num_tokens):
        raise ValueError(
            f"latents must be packed, [{num_pictures}, {num_tokens}, channels] for this call, "
            f"got {tuple(latents.shape)}."
        )
    return latents
