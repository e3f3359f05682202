"""The text arguments of a call: checks, and the rule that switches guidance on."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """One negative embedding per prompt; a single one serves all."""
    if len(negative) == 1:
        return negative * num_prompts
    if len(negative) != num_prompts:
        raise ValueError(
            f"Got {len(negative)} negative prompts for {num_prompts} prompts. Give one, or one for each."
        )
    return negative


def guidance_interval(start: float, end: float) -> tuple[float, float]:
    """The part of the steps in which guidance acts, from `cfg_start` and `cfg_end`."""
    if not 0 <= start <= end <= 1:
        raise ValueError(
            f"cfg_start and cfg_end are fractions of the steps, 0 <= cfg_start <= cfg_end <= 1, got {start} "
            f"and {end}."
        )
    return start, end
