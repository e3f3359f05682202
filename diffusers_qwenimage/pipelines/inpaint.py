"""Inpaint: image to image in which a mask says what may change."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import QwenImagePipelineOutput
from PIL import Image
from torch import Tensor

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.denoise import DenoiseInputs, KeepRegion
from diffusers_qwenimage.images import ImageInput, prepare_images
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

from .base import CallbackOnStepEnd, QwenImagePipelineBase, seeded
from .calls import one_at_a_time
from .image_to_image import clean_and_noise, for_each_picture
from .presets import with_preset
from .text import Text, guidance_interval
from .text_to_image import check_latents

logger = logging.getLogger(__name__)


class QwenImageInpaintPipeline(QwenImagePipelineBase):
    """Inpainting with Qwen-Image; arguments and results are those of diffusers' pipeline of this name."""

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor * packing.PATCH,
            vae_latent_channels=self.latent_channels,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    @one_at_a_time
    @with_preset
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 4.0,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
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
        """Repaint what the mask shows white. Arguments not listed are those of the image-to-image pipeline.

        Args:
            image: the picture, as for image to image.
            mask_image: white (1) where the picture may change, black (0) where it is kept; resized to the
                picture, and cut at one half.
            masked_image_latents: without effect, as in diffusers; there is no model that takes them.
            padding_mask_crop: work on a cut-out of the mask with this margin in pixels, and paste the result
                back; needs Pillow images and `output_type="pil"`.
            strength: in (0, 1]; at 1 the masked region is drawn anew.
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
        if masked_image_latents is not None:
            logger.warning("masked_image_latents has no effect: no Qwen-Image model takes them.")
        crop = self._crop_region(image, mask_image, rows, columns, padding_mask_crop, output_type)
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
        inputs = prepare_inpaint(
            text,
            rows,
            columns,
            image=image,
            mask_image=mask_image,
            crop=crop,
            strength=strength,
            vae=self.vae,
            processor=self.image_processor,
            mask_processor=self.mask_processor,
            scheduler=self.scheduler,
            sigmas=sigmas_before_shift,
            generator=seeded(generator, seed),
            latents=latents,
            attention_kwargs=attention_kwargs,
            device=self._execution_device,
        )

        def paste(pictures: Any) -> Any:
            if crop is None:
                return pictures
            overlay = self.image_processor.apply_overlay
            return [overlay(mask_image, image, picture, crop) for picture in pictures]

        return self._run(
            inputs,
            interval=interval,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
            finish=paste,
        )

    def _crop_region(
        self,
        image: Any,
        mask_image: Any,
        rows: int,
        columns: int,
        padding: int | None,
        output_type: str,
    ) -> tuple[int, int, int, int] | None:
        if padding is None:
            return None
        if not isinstance(image, Image.Image) or not isinstance(mask_image, Image.Image):
            raise ValueError("padding_mask_crop needs `image` and `mask_image` as single Pillow images.")
        if output_type != "pil":
            raise ValueError(f'padding_mask_crop needs output_type="pil", got {output_type!r}.')
        side = self.vae_scale_factor * packing.PATCH
        region: tuple[int, int, int, int] = self.mask_processor.get_crop_region(
            mask_image, columns * side, rows * side, pad=padding
        )
        return region


def prepare_inpaint(
    text: Text,
    rows: int,
    columns: int,
    *,
    image: ImageInput | None,
    mask_image: ImageInput | None,
    crop: tuple[int, int, int, int] | None,
    strength: float,
    vae: Any,
    processor: VaeImageProcessor,
    mask_processor: VaeImageProcessor,
    scheduler: Any,
    sigmas: Sequence[float],
    generator: packing.Generators,
    latents: Tensor | None,
    attention_kwargs: dict[str, Any] | None,
    device: torch.device,
) -> DenoiseInputs:
    """Image to image whose unmasked region is put back after each step.

    Args:
        text: encoded prompts.
        rows, columns: of tokens.
        image, mask_image, strength: see the pipeline.
        crop: region (left, top, right, bottom) to work on.
        vae, processor, scheduler, sigmas, generator, attention_kwargs, device: as for image to image.
        mask_processor: resizes masks and cuts them at one half.
        latents: packed latents to start from; the noise in them is what the kept region gets too.

    Raises:
        ValueError: if the mask or the picture is missing, or of a number that does not fit the prompts.
    """
    if mask_image is None:
        raise ValueError("Give `mask_image`, white where the picture may change.")
    resize = {"crops_coords": crop, "resize_mode": "default" if crop is None else "fill"}
    side = processor.config.vae_scale_factor
    masks = mask_processor.preprocess(
        prepare_images(mask_image, channels=1, name="mask_image"),
        height=rows * side,
        width=columns * side,
        **resize,
    )
    timesteps = set_timesteps(scheduler, sigmas, num_tokens=rows * columns, device=device, strength=strength)
    clean, noise = clean_and_noise(text, rows, columns, image, vae, processor, generator, device, **resize)
    if latents is None:
        latents = scheduler.scale_noise(clean, timesteps[:1], noise)
    else:
        latents = check_latents(latents, text.num_pictures, rows * columns).to(device, text.dtype)
        sigma = (timesteps[0] / 1000).to(text.dtype)
        noise = (latents - (1 - sigma) * clean) / sigma
    mask = torch.nn.functional.interpolate(masks, size=(rows * packing.PATCH, columns * packing.PATCH))
    mask = packing.pack(mask.repeat(1, vae.config.z_dim, 1, 1)).to(device, text.dtype)
    return DenoiseInputs(
        latents=latents,
        timesteps=timesteps,
        prompt=text.prompt,
        negative=text.negative,
        guidance_scale=text.guidance_scale,
        image_shapes=[(1, rows, columns)],
        keep=KeepRegion(mask=for_each_picture(mask, text, "mask_image"), clean=clean, noise=noise),
        attention_kwargs=attention_kwargs or {},
    )
