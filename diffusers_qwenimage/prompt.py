"""Prompts to text embeddings: the chat template, the text encoder, and a cache of what was encoded.

Qwen-Image conditions on the last hidden states of Qwen2.5-VL over a chat message; the tokens of the fixed
part before the prompt are dropped. Embeddings are lists of one tensor [T_i, width] per prompt: no padding.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The text around a prompt.

    Attributes:
        text: with `{}` where the prompt goes.
        prefix_tokens: tokens before the prompt, which are not part of the embeddings.
    """

    text: str
    prefix_tokens: int


TEXT_TO_IMAGE = ChatTemplate(
    text="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    prefix_tokens=34,
)
MAX_PROMPT_TOKENS = 1024  # longer prompts are cut by the tokenizer, as in training
CACHED_PROMPTS = 64


class PromptEncoder:
    """Encodes prompts with a tokenizer and a text encoder, each prompt once.

    The text encoder is any Qwen2.5-VL of transformers. Only its language model runs: neither the output layer
    nor the vision tower is used, so both may be on another device, or meta. Prompts are encoded one by one
    (or together when equally long), so an embedding does not depend on the other prompts of the call.
    """

    def __init__(self, template: ChatTemplate = TEXT_TO_IMAGE) -> None:
        self.template = template
        self._cache: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._encoder: weakref.ref[Any] | None = None
        self._checked: weakref.ref[Any] | None = None

    def encode(
        self, text_encoder: Any, tokenizer: Any, prompts: Sequence[str], *, device: torch.device
    ) -> list[Tensor]:
        """Embeddings [T_i, width] of each prompt, in the text encoder's type, on `device`.

        Without a text encoder, prompts that were encoded before are still known.

        Raises:
            ValueError: if the tokenizer is not Qwen's, or a prompt is no valid text or not known any more.
        """
        if text_encoder is None and self._cache:
            return self._remembered(prompts, device)
        if text_encoder is None or tokenizer is None:
            raise ValueError("This pipeline has no text encoder or no tokenizer; pass prompt_embeds instead.")
        self.check_tokenizer(tokenizer)
        self._follow(text_encoder)
        state = _state_of(text_encoder)
        keys = [(text, state, device) for text in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
        new = self._run(text_encoder, tokenizer, [text for text, _, _ in missing], device)
        self._cache.update(zip(missing, new, strict=True))
        embeds = [self._cache[key] for key in keys]
        for key in keys:
            self._cache.move_to_end(key)  # what was asked for longest ago is forgotten first
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return embeds

    def clear(self) -> None:
        """Forget all embeddings."""
        self._cache.clear()

    def _remembered(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
        known = {text: embeds for (text, _, place), embeds in self._cache.items() if place == device}
        if missing := [text for text in prompts if text not in known]:
            raise ValueError(
                f"The text encoder was freed, and {missing[0]!r} is not among the last {len(known)} prompts. "
                "Pass prompt_embeds, or pipe.register_modules(text_encoder=...)."
            )
        return [known[text] for text in prompts]

    def _run(
        self, text_encoder: Any, tokenizer: Any, prompts: Sequence[str], device: torch.device
    ) -> list[Tensor]:
        tokens = [self._tokenize(tokenizer, prompt) for prompt in prompts]
        embeds: dict[int, Tensor] = {}
        for length in sorted({len(ids) for ids in tokens}):
            same = [index for index, ids in enumerate(tokens) if len(ids) == length]
            input_ids = torch.tensor([tokens[index] for index in same], device=device)
            hidden = last_hidden_states(text_encoder, input_ids)[:, self.template.prefix_tokens :]
            embeds.update(zip(same, hidden.to(device=device, dtype=text_encoder.dtype).unbind(), strict=True))
        return [embeds[index] for index in range(len(prompts))]

    def _tokenize(self, tokenizer: Any, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The prompt {prompt!r} is no valid Unicode text: {error.reason}.") from error
        ids: list[int] = tokenizer(self.template.text.format(prompt))["input_ids"]
        limit = MAX_PROMPT_TOKENS + self.template.prefix_tokens
        if len(ids) > limit:
            logger.warning("A prompt is too long: its last %d tokens are cut off.", len(ids) - limit)
        return ids[:limit]

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Catch an empty or foreign tokenizer here, not as a strange picture later.

        Raises:
            ValueError: if the template's prefix has another number of tokens than Qwen's tokenizer makes.
        """
        if self._checked is not None and self._checked() is tokenizer:
            return
        prefix = self.template.text.split("{}")[0]
        num_tokens = len(tokenizer(prefix)["input_ids"])
        if num_tokens != self.template.prefix_tokens:
            raise ValueError(
                f"This tokenizer splits the chat template's prefix into {num_tokens} tokens instead of "
                f"{self.template.prefix_tokens}, so it is not Qwen's, or its files are missing "
                f"({len(tokenizer):,} tokens known). Load it from the checkpoint's tokenizer/ folder."
            )
        self._checked = weakref.ref(tokenizer)

    def _follow(self, text_encoder: Any) -> None:
        """Forget the embeddings of another text encoder."""
        if self._encoder is None or self._encoder() is not text_encoder:
            self.clear()
            self._encoder = weakref.ref(text_encoder)


@torch.no_grad()
def last_hidden_states(text_encoder: Any, input_ids: Tensor) -> Tensor:
    """Hidden states [B, T, width] after the final norm, for tokens [B, T] without padding."""
    arguments = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    if hasattr(text_encoder, "_hf_hook") or hasattr(text_encoder, "_diffusers_hook"):
        # A hook on the whole module brings its weights to the device, so the whole module has to be called.
        output = text_encoder(**arguments, output_hidden_states=True, logits_to_keep=1)
        hidden: Tensor = output.hidden_states[-1]
        return hidden
    backbone = getattr(text_encoder, "model", text_encoder)
    language_model = getattr(backbone, "language_model", backbone)
    hidden = language_model(**arguments).last_hidden_state
    return hidden


def pad(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Embeddings [T_i, width] as [B, T, width] with zeros behind, and the mask [B, T] if one is needed."""
    lengths = [sample.shape[0] for sample in embeds]
    if len(set(lengths)) == 1:
        return torch.stack(list(embeds)), None
    padded = torch.nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
    positions = torch.arange(max(lengths), device=padded.device)
    mask = positions < torch.tensor(lengths, device=padded.device)[:, None]
    return padded, mask.long()


def unpad(embeds: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Split embeddings [B, T, width] into one [T_i, width] per sample, without what the mask [B, T] hides.

    Raises:
        ValueError: if shapes differ, a sample is wholly masked, or text follows padding (its position
            would change).
    """
    if mask is None:
        return list(embeds.unbind())
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"The mask {tuple(mask.shape)} must have the shape {tuple(embeds.shape[:2])} of the embeddings."
        )
    kept = mask.bool()
    lengths = kept.sum(dim=1).tolist()
    if min(lengths) == 0:
        raise ValueError("The mask hides every token of a prompt; even an empty one has closing tokens.")
    if any(not bool(kept[index, :length].all()) for index, length in enumerate(lengths)):
        raise ValueError("Padding must come after the text: the mask has a 1 behind a 0.")
    return [sample[:length] for sample, length in zip(embeds, lengths, strict=True)]


def _state_of(text_encoder: Any) -> tuple[object, ...]:
    """Something that changes when the weights do: in-place edits count up a tensor's version."""
    versions = sum(parameter._version for parameter in text_encoder.parameters())
    return text_encoder.dtype, versions
