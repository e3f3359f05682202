"""The text of a call: checks, embeddings, and the rule that switches guidance on."""

import gc
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from diffusers_qwenimage.prompt import MAX_PROMPT_TOKENS, PromptEncoder, pad, unpad

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Encoded prompts of a call.

    Attributes:
        prompt: embeddings [T_i, width], one per picture.
        negative: likewise; None when guidance is off.
        guidance_scale: true_cfg_scale of the call.
        num_prompts: prompts given; pictures of one prompt lie next to each other.
    """

    prompt: list[Tensor]
    negative: list[Tensor] | None
    guidance_scale: float
    num_prompts: int

    @property
    def num_pictures(self) -> int:
        """Pictures to make."""
        return len(self.prompt)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embeddings, and so of the latents."""
        return self.prompt[0].dtype


class TextMixin:
    """Text embeddings of a pipeline, for its calls and for its users."""

    _prompt_encoder: PromptEncoder

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = MAX_PROMPT_TOKENS,
    ) -> tuple[Tensor, Tensor | None]:
        """Text embeddings [prompts * num_images_per_prompt, T, width] and their mask, None if all are text.

        Args:
            prompt: one or more prompts, if no embeddings are given.
            device: where to encode.
            num_images_per_prompt: copies of each prompt, next to each other.
            prompt_embeds: embeddings made before, [prompts, T, width].
            prompt_embeds_mask: [prompts, T].
            max_sequence_length: tokens kept of each prompt.
        """
        embeds = self._embed(prompt, prompt_embeds, prompt_embeds_mask, max_sequence_length, device)
        return pad([sample for sample in embeds for _ in range(num_images_per_prompt)])

    def clear_prompt_cache(self) -> None:
        """Forget the embeddings of earlier prompts (the last 64 are kept)."""
        self._prompt_encoder.clear()

    def free_text_encoder(self) -> None:
        """Give back the memory of the text encoder. The last 64 prompts stay known; others need embeddings.

        Raises:
            ValueError: with VRAM management on, which keeps the text encoder off the device by itself.
        """
        pipe = cast(Any, self)
        if pipe._vram is not None:
            raise ValueError(
                "VRAM management is on and keeps the text encoder off the device when it does not run. Call "
                "pipe.disable_vram_management() first."
            )
        pipe.register_modules(text_encoder=None)
        gc.collect()  # modules refer to each other in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode_text(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        true_cfg_scale: float,
        prompt_embeds: Tensor | None,
        prompt_embeds_mask: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_prompt_embeds_mask: Tensor | None,
        *,
        num_images_per_prompt: int,
        max_sequence_length: int,
    ) -> Text:
        """Check and encode both prompts; guidance needs a negative prompt and a scale above 1."""
        check_text("prompt", prompt, prompt_embeds, prompt_embeds_mask, required=True)
        check_text(
            "negative_prompt",
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_embeds_mask,
            required=False,
        )
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        if not 1 <= max_sequence_length <= MAX_PROMPT_TOKENS:
            raise ValueError(
                f"max_sequence_length must be between 1 and {MAX_PROMPT_TOKENS}, got {max_sequence_length}."
            )
        positive = self._embed(prompt, prompt_embeds, prompt_embeds_mask, max_sequence_length)
        negative = None
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if guidance_is_on(true_cfg_scale, has_negative):
            embeds = self._embed(
                negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask, max_sequence_length
            )
            negative = join_negative(embeds, len(positive))
        positive, negative = self._as_computed(positive), negative and self._as_computed(negative)
        return Text(
            prompt=[sample for sample in positive for _ in range(num_images_per_prompt)],
            negative=None
            if negative is None
            else [sample for sample in negative for _ in range(num_images_per_prompt)],
            guidance_scale=true_cfg_scale,
            num_prompts=len(positive),
        )

    def _as_computed(self, samples: list[Tensor]) -> list[Tensor]:
        """In the type of the transformer: without `dtype`, diffusers loads it in fp32, but the text encoder
        in the type that its config names."""
        dtype: torch.dtype = cast(Any, self).transformer.dtype
        return samples if dtype.itemsize == 1 else [sample.to(dtype) for sample in samples]

    def _embed(
        self,
        prompt: str | list[str] | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        max_sequence_length: int,
        device: torch.device | None = None,
    ) -> list[Tensor]:
        pipe = cast(Any, self)
        device = device or pipe._execution_device
        if embeds is not None:
            samples = unpad(embeds.to(device), None if mask is None else mask.to(device))
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
            with pipe._encoding_text():
                samples = self._prompt_encoder.encode(
                    pipe.text_encoder, pipe.tokenizer, prompts, device=device
                )
        longest = max(sample.shape[0] for sample in samples)
        if longest > max_sequence_length:
            logger.warning(
                "A prompt has %d tokens; the last %d are cut off (max_sequence_length=%d).",
                longest,
                longest - max_sequence_length,
                max_sequence_length,
            )
        return [sample[:max_sequence_length] for sample in samples]


def check_text(name: str, text: Any, embeds: Tensor | None, mask: Tensor | None, *, required: bool) -> None:
    """Refuse text arguments that contradict each other; `name` is "prompt" or "negative_prompt"."""
    if text is not None and embeds is not None:
        raise ValueError(f"Give either {name} or {name}_embeds, not both.")
    if text is None and embeds is None:
        if required:
            raise ValueError(f"Give {name} or {name}_embeds.")
        return
    if text is not None:
        items = text if isinstance(text, list) else [text]
        if not items or any(not isinstance(item, str) for item in items):
            kinds = sorted({type(item).__name__ for item in items}) or ["an empty list"]
            raise ValueError(f"{name} must be a text or a list of texts, got {', '.join(kinds)}.")
    if embeds is not None and embeds.ndim != 3:
        raise ValueError(f"{name}_embeds must be [prompts, tokens, width], got {tuple(embeds.shape)}.")
    if embeds is not None and mask is None:
        logger.warning(
            "%s_embeds came without %s_embeds_mask: every token counts as text. If there is padding, pass "
            "the mask that encode_prompt returned with them.",
            name,
            name,
        )


def guidance_is_on(scale: float, has_negative: bool) -> bool:
    """Whether guidance acts: above 1, and with a negative prompt (an empty one counts)."""
    if scale > 1 and not has_negative:
        logger.warning(
            "true_cfg_scale is %s, but guidance is off because there is no negative_prompt; pass "
            'negative_prompt=" " to switch it on.',
            scale,
        )
    elif scale <= 1 and has_negative:
        logger.warning("negative_prompt has no effect because true_cfg_scale is %s; it acts above 1.", scale)
    return scale > 1 and has_negative


def join_negative(negative: list[Tensor], num_prompts: int) -> list[Tensor]:
    """One negative embedding [T_i, width] per prompt; a single one serves all.

    Raises:
        ValueError: if there is another number of them.
    """
    if len(negative) == 1:
        return negative * num_prompts
    if len(negative) != num_prompts:
        raise ValueError(
            f"Got {len(negative)} negative prompts for {num_prompts} prompts. Give one, or one for each."
        )
    return negative


def guidance_interval(start: float, end: float) -> tuple[float, float]:
    """The part of the steps in which guidance acts, from `cfg_start` and `cfg_end`.

    Raises:
        ValueError: if they are no fractions, or the end lies before the start.
    """
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"cfg_start and cfg_end are fractions of the steps, 0 <= cfg_start <= cfg_end <= 1, got {start} "
            f"and {end}."
        )
    return start, end
