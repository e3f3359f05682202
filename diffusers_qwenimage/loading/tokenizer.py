"""The tokenizer, checked at load: a wrong one draws the wrong picture or fails far away."""

from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer

from diffusers_qwenimage.prompt import TEXT_TO_IMAGE, ChatTemplate

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def load_tokenizer(folder: str | Path, *, template: ChatTemplate = TEXT_TO_IMAGE) -> Any:
    """The `Qwen2Tokenizer` of a folder, checked against the chat template it will be used with.

    transformers 5 returns a tokenizer of one token, without a word, for a missing or empty folder; and the
    prompt's embeddings are cut out by position, so the template's prefix must have its number of tokens.

    Raises:
        FileNotFoundError: if the folder or its vocabulary is missing.
        ValueError: if it is not a tokenizer of this family.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"The tokenizer's folder {path} does not exist.")
    if not (path / "tokenizer.json").is_file() and not all(
        (path / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        raise FileNotFoundError(
            f"{path} holds no tokenizer: it needs tokenizer.json, or vocab.json with merges.txt. "
            "Take the folder tokenizer/ of the model."
        )
    tokenizer = Qwen2Tokenizer.from_pretrained(str(path), local_files_only=True)
    check_tokenizer(tokenizer, template=template, name=str(path))
    return tokenizer


def check_tokenizer(
    tokenizer: Any, *, template: ChatTemplate = TEXT_TO_IMAGE, name: str = "The tokenizer"
) -> None:
    """Check special tokens and the length of the template's prefix.

    Raises:
        ValueError: if the tokenizer does not fit.
    """
    split = [token for token in SPECIAL_TOKENS if len(tokenizer(token).input_ids) != 1]
    if split:
        raise ValueError(
            f"{name} does not know {', '.join(split)} as single tokens (it has {len(tokenizer)} tokens). "
            "It is not a Qwen tokenizer, or its files are incomplete."
        )
    num_tokens = len(tokenizer(template.text.split("{}")[0]).input_ids)
    if num_tokens != template.prefix_tokens:
        raise ValueError(
            f"{name} makes {num_tokens} tokens of the chat template's prefix instead of "
            f"{template.prefix_tokens}, so prompts would be cut at the wrong place. Take the tokenizer that "
            "belongs to the model."
        )
