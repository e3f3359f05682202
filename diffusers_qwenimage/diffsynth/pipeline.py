"""DiffSynth-Studio's `QwenImagePipeline`: loading by `ModelConfig`, one prompt in, one picture out."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.denoise import DenoiseInputs, OnStep, PromptEmbeds, denoise
from diffusers_qwenimage.images import open_image
from diffusers_qwenimage.loading import load_scheduler
from diffusers_qwenimage.offload.stream import device_of
from diffusers_qwenimage.pipelines.adapters import attach_lora, detach_loras, open_lora
from diffusers_qwenimage.pipelines.memory import VramManagementMixin
from diffusers_qwenimage.pipelines.needs import Demand, demand_of
from diffusers_qwenimage.pipelines.sizes import recorded_sample_size, warn_if_far
from diffusers_qwenimage.pipelines.vram_plan import Parts
from diffusers_qwenimage.precompile import compile_autoencoder
from diffusers_qwenimage.prompt import MAX_PROMPT_TOKENS, TEXT_TO_IMAGE, PromptEncoder
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps
from diffusers_qwenimage.vae import TILING_ATTRIBUTES

from .model_config import ModelConfig
from .models import PATTERNS, find_tokenizer, load_models, lora_file

logger = logging.getLogger(__name__)

QWEN_IMAGE_TOKENIZER = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/")
DEFAULT_SAMPLE_SIZE = 166  # latent pixels on a side: 1328 picture pixels


class QwenImagePipeline(VramManagementMixin):
    """Text to image and image to image. Made by `from_pretrained`.

    Attributes:
        torch_dtype, device: what is computed in and on.
        dit: the transformer; None if no file of it was given, likewise the next two.
        vae: pictures to latents and back.
        text_encoder: Qwen2.5-VL.
        tokenizer: its tokenizer, or None.
        scheduler: with the published settings.
    """

    def __init__(
        self,
        *,
        torch_dtype: torch.dtype,
        device: torch.device,
        dit: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
    ) -> None:
        self.torch_dtype = torch_dtype
        self.device = device
        self.dit = dit
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.scheduler: Any = load_scheduler()
        self._prompt_encoder = PromptEncoder()

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig | None = QWEN_IMAGE_TOKENIZER,
    ) -> "QwenImagePipeline":
        """Load the models, recognised by their keys, in any order; files that are missing are downloaded.

        Args:
            torch_dtype: what is computed in.
            device: what is computed on.
            model_configs: files of the transformer, the text encoder and the VAE.
            tokenizer_config: folder of the tokenizer; None loads none.

        Raises:
            FileNotFoundError: if a file is missing and is not to be downloaded.
            DownloadError: if the hub cannot deliver a file.
            ValueError: if a file is none of the three models, a model comes twice, or there is no such GPU.
        """
        target = _device(device)
        models = load_models(model_configs, dtype=torch_dtype, device=target)
        return cls(
            torch_dtype=torch_dtype,
            device=target,
            dit=models.get("transformer"),
            vae=models.get("vae"),
            text_encoder=models.get("text_encoder"),
            tokenizer=None if tokenizer_config is None else find_tokenizer(tokenizer_config),
        )

    def load_lora(
        self,
        module: Any,
        lora_config: ModelConfig | str | Path | None = None,
        alpha: float = 1,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a LoRA of any format to `module` (`pipe.dit`); several add up. `clear_lora` takes them off.

        Args:
            lora_config: the file, or a `ModelConfig` that names one.
            alpha: strength; multiplies the scale that the file has itself.
            state_dict: the tensors of the file, instead of `lora_config`.

        Raises:
            ValueError: if the file is not understood, does not fit, or changes nothing in the module.
        """
        if module is None or module is not self.dit:
            raise ValueError("LoRA files change the transformer: pass pipe.dit, of a pipeline that has one.")
        if (lora_config is None) == (state_dict is None):
            raise ValueError("Give either lora_config (a file) or state_dict.")
        source = state_dict if lora_config is None else lora_file(lora_config)
        assert source is not None
        attach_lora(module, open_lora(source), strength=alpha)

    def clear_lora(self) -> None:
        """Remove every LoRA; the weights are those that were loaded."""
        if self.dit is not None:
            detach_loras(self.dit)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "",
        negative_prompt: str = "",
        cfg_scale: float = 1.0,
        input_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        rand_device: str | torch.device = "cpu",
        num_inference_steps: int = 30,
        tiled: bool = False,
        tile_size: int | tuple[int, int] = 128,
        tile_stride: int | tuple[int, int] = 64,
        progress_bar_cmd: Callable[[Iterable[Any]], Iterable[Any]] = tqdm,
        *,
        generator: torch.Generator | None = None,
    ) -> Image.Image:
        """Make one picture.

        Args:
            prompt: what the picture shows.
            negative_prompt: what it does not show; acts with `cfg_scale` above 1.
            cfg_scale: strength of classifier-free guidance; 1 is none.
            input_image: picture to start from, of size `width` x `height`.
            denoising_strength: 0 gives `input_image` back, 1 takes nothing of it. All steps run, over the
                last part of the schedule.
            height, width: in pixels, multiples of 16; others are rounded up, with a warning. Default 1328, or
                what the checkpoint says it was made for.
            seed: of the noise; None is random.
            rand_device: where the noise is drawn; its numbers differ between devices.
            num_inference_steps: denoising steps, at least 1.
            tiled: run the VAE in tiles, with less memory and small differences.
            tile_size, tile_stride: in latent pixels (8 image pixels), one number or (height, width).
            progress_bar_cmd: wraps the steps, as `tqdm` does; `lambda x: x` shows nothing.
            generator: draws the noise, on its own device; instead of `seed` and `rand_device`.

        Raises:
            ValueError: for arguments that cannot be met, or if a model that is needed was not loaded.
        """
        self._require("dit", "vae", "text_encoder", "tokenizer")
        side = self.vae.spatial_compression_ratio * packing.PATCH  # pixels of a token: 16
        default = (recorded_sample_size(self.dit) or DEFAULT_SAMPLE_SIZE) * self.vae.spatial_compression_ratio
        height, width = default if height is None else height, default if width is None else width
        rows, columns = _token_grid(height, width, side)
        warn_if_far(self.dit, rows * side, columns * side, scale_factor=self.vae.spatial_compression_ratio)
        sizes = ((width, height), (columns * side, rows * side))
        picture = _check_start(input_image, denoising_strength, *sizes)
        if not math.isfinite(cfg_scale):
            raise ValueError(f"cfg_scale must be a finite number, got {cfg_scale}.")
        text, negative = self._encode(prompt, negative_prompt, guided=cfg_scale > 1)
        noise = self._noise(rows, columns, seed, rand_device, generator)
        sigmas = even_sigmas(num_inference_steps, denoising_strength or 1.0)
        with _tiles(self.vae, tiled, tile_size, tile_stride):
            clean = None if picture is None else self._encode_image(picture)
            timesteps = set_timesteps(self.scheduler, sigmas, num_tokens=rows * columns, device=self.device)
            inputs = DenoiseInputs(
                latents=noise if clean is None else _mix(clean, noise, self.scheduler.sigmas[0]),
                timesteps=timesteps,
                prompt=text,
                negative=negative,
                guidance_scale=cfg_scale,
                image_shapes=[(1, rows, columns)],
            )
            if clean is not None and denoising_strength == 0:
                final = clean
            else:
                compile_autoencoder(self.vae, self.device)  # while the transformer works
                on_step = _progress(progress_bar_cmd, timesteps)
                with self._denoising(demand_of(inputs)):
                    final = denoise(self.dit, self.scheduler, inputs, on_step=on_step)
            return self._decode(final, rows, columns)

    def _vram_parts(self) -> Parts:
        return Parts(transformer=self.dit, text_encoder=self.text_encoder, vae=self.vae)

    def _vram_demand(self) -> Demand:
        side = (recorded_sample_size(self.dit) or DEFAULT_SAMPLE_SIZE) // packing.PATCH
        return Demand(rows=side, columns=side)

    def _vram_device(self, device: str | torch.device | None) -> torch.device:
        return device_of(self.device if device is None else device)

    def _refuse_other_offloading(self) -> None:
        """This pipeline has no other."""

    def _require(self, *names: str) -> None:
        for name in names:
            model = getattr(self, name)
            if model is None:
                raise ValueError(
                    f"This pipeline has no {name}. Add ModelConfig(model_id=..., origin_file_pattern="
                    f'"{PATTERNS[name]}") to '
                    f"{'tokenizer_config' if name == 'tokenizer' else 'model_configs'} of from_pretrained."
                )
            where = getattr(model, "device", self.device)
            if self._vram is None and where.type != self.device.type:
                raise ValueError(
                    f"The {name} is on {where} (its offload_device or offload_dtype), but the pipeline "
                    f"computes on {self.device}. Call pipe.enable_vram_management(), or pipe.{name}.to("
                    f"{str(self.device)!r})."
                )

    def _encode(
        self, prompt: str, negative: str, *, guided: bool
    ) -> tuple[PromptEmbeds, PromptEmbeds | None]:
        texts = [prompt, negative] if guided else [prompt]
        if kinds := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise ValueError(
                f"A prompt must be one text, got {kinds[0]}. Call once per prompt, or use "
                "diffusers_qwenimage.QwenImagePipeline for batches."
            )
        with self._encoding_text():
            embeds = self._prompt_encoder.encode(self.text_encoder, self.tokenizer, texts, device=self.device)
        for text in texts:
            self._warn_if_cut(text)
        cast = [tensor.to(self.torch_dtype) for tensor in embeds]
        return cast[:1], cast[1:] or None

    def _warn_if_cut(self, text: str) -> None:
        num_tokens = len(self.tokenizer(TEXT_TO_IMAGE.text.format(text)).input_ids)
        limit = MAX_PROMPT_TOKENS + TEXT_TO_IMAGE.prefix_tokens
        if num_tokens > limit:
            logger.warning("The prompt is too long: its last %d tokens are cut off.", num_tokens - limit)

    def _noise(
        self,
        rows: int,
        columns: int,
        seed: int | None,
        rand_device: str | torch.device,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Packed noise [1, rows * columns, 4 z], drawn as [1, z, height / 8, width / 8] in `torch_dtype`."""
        if seed is not None and not (_is_whole(seed) and -(2**63) <= seed < 2**64):
            raise ValueError(f"seed must be a whole number of 64 bits or None, got {seed!r}.")
        if seed is not None and generator is not None:
            raise ValueError("Give either seed or generator, not both.")
        where = _device(rand_device) if generator is None else generator.device
        if seed is not None:
            generator = torch.Generator(where).manual_seed(int(seed))
        channels = self.dit.config.in_channels // packing.PATCH**2
        shape = (1, channels, rows * packing.PATCH, columns * packing.PATCH)
        noise = torch.randn(shape, generator=generator, device=where, dtype=self.torch_dtype)
        return packing.pack(noise.to(self.device))

    def _encode_image(self, picture: Image.Image) -> Tensor:
        """The mode of the picture's posterior, packed: [1, rows * columns, 4 z]."""
        values = torch.from_numpy(np.asarray(picture).astype(np.float32)) / 255
        pixels = (2 * values - 1).permute(2, 0, 1)[None].to(self.device, self.vae.dtype)
        return packing.encode(self.vae, pixels, sample=False).to(self.torch_dtype)

    def _decode(self, latents: Tensor, rows: int, columns: int) -> Image.Image:
        if not torch.isfinite(latents).all():
            logger.warning("The latents hold NaN or infinite values; the picture will be broken.")
        pixels = packing.decode(self.vae, latents, rows, columns)
        picture: Image.Image = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
        return picture


def _device(device: str | torch.device) -> torch.device:
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device is "{device}", but torch sees no such GPU. Use device="cpu".')
    return target


def _token_grid(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of tokens of `side` pixels, sizes rounded up."""
    for name, value in (("height", height), ("width", width)):
        if not _is_whole(value) or value < 1:
            raise ValueError(f"{name} must be a positive whole number of pixels, got {value!r}.")
    rows, columns = -(-height // side), -(-width // side)
    if (rows * side, columns * side) != (height, width):
        logger.warning(
            "height and width must be multiples of %d: %d x %d is rounded up to %d x %d.",
            *(side, height, width, rows * side, columns * side),
        )
    return rows, columns


def _is_whole(value: Any) -> bool:
    """Python's and numpy's integers, not True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_start(
    image: Any, strength: float, size: tuple[int, int], rounded: tuple[int, int]
) -> Image.Image | None:
    """The picture to start from: upright RGB, of the asked size (width, height), brought to `rounded`."""
    if not 0 <= strength <= 1:
        raise ValueError(f"denoising_strength must be between 0 and 1, got {strength}.")
    if image is None:
        if strength != 1:
            raise ValueError(
                f"denoising_strength is {strength}, but there is no input_image. Give one, or leave it at 1."
            )
        return None
    picture = open_image(image)
    if picture.size not in (size, rounded):
        raise ValueError(
            f"input_image is {picture.width} x {picture.height} pixels, but width x height is "
            f"{size[0]} x {size[1]}. Resize the picture, or pass height={picture.height}, "
            f"width={picture.width}."
        )
    return picture if picture.size == rounded else picture.resize(rounded, Image.Resampling.LANCZOS)


def _mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents at `sigma` (flow matching): (1 - sigma) clean + sigma noise."""
    level = sigma.to(clean.device)
    return ((1 - level) * clean + level * noise).to(clean.dtype)


@contextmanager
def _tiles(
    vae: Any, tiled: bool, size: int | tuple[int, int], stride: int | tuple[int, int]
) -> Iterator[None]:
    """Tiling for the time of one call."""
    if not tiled:
        yield
        return
    before = {name: getattr(vae, name) for name in ("use_tiling", *TILING_ATTRIBUTES)}
    vae.enable_tiling(tile_size=size, tile_stride=stride)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _progress(wrap: Callable[[Iterable[Any]], Iterable[Any]], timesteps: Tensor) -> OnStep:
    """Advance the user's bar after each step. It is asked once before, as a loop over it would."""
    bar = iter(wrap(timesteps))
    next(bar, None)

    def on_step(
        index: int, timestep: Tensor, latents: Tensor, prompt: PromptEmbeds
    ) -> tuple[Tensor, PromptEmbeds]:
        next(bar, None)
        return latents, prompt

    return on_step
