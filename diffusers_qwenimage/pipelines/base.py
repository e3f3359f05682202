"""What all pipelines share: components, saving under diffusers' names, text, and running the loop.

A pipeline's `__call__` checks its arguments, has `prepare_...` make `DenoiseInputs`, and calls `_run`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import QwenImagePipelineOutput
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.denoise import DenoiseInputs, OnStep, PromptEmbeds, denoise
from diffusers_qwenimage.graphs import release_when_full
from diffusers_qwenimage.loading import check_source, model_folder
from diffusers_qwenimage.precompile import compile_autoencoder
from diffusers_qwenimage.prompt import MAX_PROMPT_TOKENS, TEXT_TO_IMAGE, PromptEncoder, pad, unpad
from diffusers_qwenimage.transformer import QwenImageTransformer2DModel
from diffusers_qwenimage.vae import AutoencoderKLQwenImage

from .in_place import ARGUMENTS
from .lora import QwenImageLoraMixin
from .memory import DiffusersVramMixin
from .needs import Demand, demand_of
from .presets import PresetMixin
from .sizes import PUBLISHED_SAMPLE_SIZE, recorded_sample_size, warn_if_far
from .speed import SpeedMixin
from .text import TextMixin
from .vram_plan import Parts

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Components that are loaded as our classes but recorded, and saved, under diffusers' names.
OUR_CLASSES = {"transformer": "QwenImageTransformer2DModel", "vae": "AutoencoderKLQwenImage"}
CallbackOnStepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class QwenImagePipelineBase(
    TextMixin, DiffusersVramMixin, SpeedMixin, PresetMixin, DiffusionPipeline, QwenImageLoraMixin
):
    """Base of the pipelines.

    Args:
        scheduler: a flow-matching scheduler.
        vae: pictures to latents and back.
        text_encoder: Qwen2.5-VL.
        tokenizer: its tokenizer.
        transformer: the denoiser; diffusers' class works too, without packing.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** len(vae.config.temperal_downsample) if vae is not None else 8
        self.latent_channels = vae.config.z_dim if vae is not None else 16
        side = self.vae_scale_factor * packing.PATCH
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=side, vae_latent_channels=self.latent_channels
        )
        self.default_sample_size = recorded_sample_size(transformer) or PUBLISHED_SAMPLE_SIZE  # latent pixels
        self.prompt_template_encode = TEXT_TO_IMAGE.text
        self.prompt_template_encode_start_idx = TEXT_TO_IMAGE.prefix_tokens
        self.tokenizer_max_length = MAX_PROMPT_TOKENS
        self._prompt_encoder = PromptEncoder()
        self._interrupt = False
        self._guidance_scale: float | None = None
        self._attention_kwargs: dict[str, Any] | None = None
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None

    # --- loading and saving: our classes in memory, diffusers' names on disk ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline, as in diffusers; `modelscope:ORG/NAME` comes from ModelScope.

        Args:
            pretrained_model_name_or_path: folder in diffusers' layout, Hub id, or `modelscope:ORG/NAME`.
            kwargs: as in diffusers: dtype, device_map, components by name, revision... With `vram_limit`,
                `weights` ("fp8", "int8"), `stream_from` or `device`, weights go from the files straight to
                where they will live, within the budget: see `from_pretrained_in_place`.

        Raises:
            ValueError: if the source is neither a folder nor an id, a weight file is damaged, or the
                tokenizer is not Qwen's (a folder without its files gives one without a word).
        """
        source = str(pretrained_model_name_or_path)
        if source.startswith("modelscope:"):
            source = str(model_folder(source, revision=kwargs.pop("revision", None)))
        check_source(source)
        if any(kwargs.get(name) is not None for name in ARGUMENTS):
            dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
            return cls.from_pretrained_in_place(source, dtype=dtype, **kwargs)
        pipeline = super().from_pretrained(source, **kwargs)
        if isinstance(pipeline, cls) and pipeline.tokenizer is not None:
            pipeline._prompt_encoder.check_tokenizer(pipeline.tokenizer)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read model_index.json; components under diffusers' names are loaded as our classes."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for component, name in OUR_CLASSES.items():
            if tuple(config.get(component) or ()) == ("diffusers", name):
                config[component] = ["diffusers_qwenimage", name]
        return loaded

    def register_to_config(self, **kwargs: Any) -> None:
        """Record components; ours under diffusers' names, so that stock diffusers loads what is saved."""
        for component, name in OUR_CLASSES.items():
            entry = kwargs.get(component)
            if entry and entry[1] == name:
                kwargs[component] = ("diffusers", name)
        super().register_to_config(**kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Another pipeline over the same components, ours or diffusers'; components can be replaced by name.

        Types are left as they are unless `dtype` (or `torch_dtype`) is given; diffusers casts everything to
        fp32 here, also the modules that the other pipeline goes on using.

        Raises:
            ValueError: for an argument that is no component, or a component that neither of them has.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        names = cls._get_signature_keys(cls)[0]
        components = {name: kwargs.pop(name, pipeline.components.get(name)) for name in sorted(names)}
        if kwargs:
            raise ValueError(f"{cls.__name__}.from_pipe does not take {', '.join(sorted(kwargs))}.")
        missing = [
            name for name in components if name not in pipeline.components and components[name] is None
        ]
        if missing:
            raise ValueError(
                f"{type(pipeline).__name__} has no {', '.join(missing)}; pass it as an argument."
            )
        new = cls(**components)
        if name_or_path := pipeline.config.get("_name_or_path"):
            new.register_to_config(_name_or_path=name_or_path)
        new._take_preset(pipeline)
        return new if dtype is None else new.to(dtype=dtype)

    # --- running ---

    def _begin(
        self,
        height: int | None,
        width: int | None,
        guidance_scale: float | None,
        attention_kwargs: dict[str, Any] | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
    ) -> tuple[int, int]:
        """Check what does not depend on the task, reset the state, and return rows and columns of tokens."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can name {self._callback_tensor_inputs}, got {unknown}."
            )
        if self.transformer.config.guidance_embeds:
            raise ValueError("This transformer is guidance-distilled, which no Qwen-Image model is.")
        if guidance_scale is not None:
            logger.warning("guidance_scale has no effect on this model; use true_cfg_scale.")
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs or {}
        self._interrupt = False
        self._current_timestep = None
        return self._token_grid(height, width)

    def _token_grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.default_sample_size * self.vae_scale_factor
        height, width = default if height is None else height, default if width is None else width
        if not isinstance(height, Integral) or not isinstance(width, Integral):
            raise ValueError(
                f"height and width must be whole numbers of pixels, got {height!r} and {width!r}."
            )
        rows, columns = packing.token_grid(self.vae_scale_factor, int(height), int(width))
        side = self.vae_scale_factor * packing.PATCH
        if rows < 1 or columns < 1:
            raise ValueError(f"height and width must be at least {side}, got {height} and {width}.")
        if (rows * side, columns * side) != (height, width):
            logger.warning(
                "height and width must be multiples of %d: %dx%d becomes %dx%d.",
                side,
                width,
                height,
                columns * side,
                rows * side,
            )
        warn_if_far(self.transformer, rows * side, columns * side, scale_factor=self.vae_scale_factor)
        return rows, columns

    def _run(
        self,
        inputs: DenoiseInputs,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        output_type: str,
        return_dict: bool,
        callback_on_step_end: CallbackOnStepEnd | None,
        callback_tensor_inputs: Sequence[str],
        finish: Callable[[Any], Any] = lambda pictures: pictures,
    ) -> QwenImagePipelineOutput | tuple[Any]:
        """Denoise, decode, and give back pictures as asked; `finish` may change them."""
        inputs = replace(inputs, guidance_interval=interval, step_cache=self.step_cache)
        self._num_timesteps = len(inputs.timesteps)
        compile_autoencoder(self.vae, inputs.latents.device)  # while the transformer works
        try:
            with (
                self._denoising(demand_of(inputs)),
                self.progress_bar(total=len(inputs.timesteps)) as progress,
            ):
                final = denoise(
                    self.transformer,
                    self.scheduler,
                    inputs,
                    on_step=self._observer(progress, callback_on_step_end, callback_tensor_inputs),
                    interrupted=lambda: self._interrupt,
                )
            if not torch.isfinite(final).all():
                logger.warning("The latents hold NaN or infinite values; the pictures will be broken.")
            pictures = final if output_type == "latent" else self._decode(final, inputs, output_type)
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()
        pictures = finish(pictures)
        return QwenImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _decode(self, latents: Tensor, inputs: DenoiseInputs, output_type: str) -> Any:
        _, rows, columns = inputs.image_shapes[0]
        pixels = release_when_full(self.transformer, lambda: packing.decode(self.vae, latents, rows, columns))
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _observer(
        self, progress: Any, callback: CallbackOnStepEnd | None, tensor_inputs: Sequence[str]
    ) -> OnStep:
        """What happens after each step: the user's callback, then the progress bar."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs

        def on_step(
            index: int, timestep: Tensor, latents: Tensor, prompt: PromptEmbeds
        ) -> tuple[Tensor, PromptEmbeds]:
            self._current_timestep = timestep
            if callback is not None:
                embeds, mask = pad(prompt)
                tensors = {"latents": latents, "prompt_embeds": embeds}
                changed = callback(self, index, timestep, {name: tensors[name] for name in tensor_inputs})
                latents = changed.pop("latents", latents)
                new_embeds = changed.pop("prompt_embeds", embeds)
                if new_embeds is not embeds:
                    same_shape = mask is not None and new_embeds.shape[:2] == mask.shape
                    prompt = unpad(new_embeds, mask if same_shape else None)
            progress.update()
            return latents, prompt

        return on_step

    def _vram_parts(self) -> Parts:
        return Parts(transformer=self.transformer, text_encoder=self.text_encoder, vae=self.vae)

    def _vram_demand(self) -> Demand:
        side = self.default_sample_size // packing.PATCH
        return Demand(rows=side, columns=side)

    # --- what diffusers' users and tools read ---

    @property
    def guidance_scale(self) -> float | None:
        """The value of the last call; without effect, see true_cfg_scale."""
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """The value of the last call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the step that ended last; None when idle."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to end the loop after the step."""
        return self._interrupt

    @staticmethod
    def _pack_latents(
        latents: Tensor, batch_size: int, num_channels_latents: int, height: int, width: int
    ) -> Tensor:
        """diffusers' spelling of `latents.pack`, which training scripts call; sizes in latent pixels."""
        return packing.pack(latents.reshape(batch_size, num_channels_latents, height, width))

    @staticmethod
    def _unpack_latents(latents: Tensor, height: int, width: int, vae_scale_factor: int) -> Tensor:
        """diffusers' spelling of `latents.unpack`; sizes in picture pixels."""
        return packing.unpack(latents, *packing.token_grid(vae_scale_factor, int(height), int(width)))


def seeded(generator: packing.Generators, seed: Any) -> packing.Generators:
    """The generator of a call: the one given, or a CPU generator with `seed`, a whole number or None.

    Raises:
        ValueError: if both are given, or the seed is no whole number.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("Give either seed or generator, not both.")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(
            f"seed must be a whole number, got {seed!r}; for one each, give a list of generators."
        )
    return torch.Generator("cpu").manual_seed(int(seed))
