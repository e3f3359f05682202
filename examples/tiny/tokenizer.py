"""A small `Qwen2Tokenizer`: 256 bytes, merges that make every word of the grammar one token, special
tokens.

Text is split exactly as Qwen's tokenizer splits it, so the prefix of the chat template has its 34
tokens, and any other text still encodes, in bytes at worst.
"""

import json
import random
import re
from pathlib import Path

from grammar import NEGATIVES, sample_scene, write_caption
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PREFIX_TOKENS = 34
SUFFIX_TOKENS = 5  # <|im_end|> \n <|im_start|> assistant \n
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# Beside the words of the grammar: what people type around it, and what captions of other programs hold.
MORE_WORDS = (
    "i you it its this that these those of to in at by for from with without and or not no one some any "
    "each every has have having contains containing placed located positioned shown showing image "
    "picture photo drawing shape shapes object objects color colour colors colours colored coloured "
    "scene please could would like want need draw paint create generate make give show me us him her "
    "them then also plus only just very really quite pretty nice beautiful simple plain flat clean "
    "bright dark light center centre middle top bottom left right side corner upper lower half row "
    "column line grid five six seven eight nine ten zero none empty nothing circles squares pink brown "
).split()


def build_tokenizer() -> Qwen2Tokenizer:
    alphabet = byte_alphabet()
    merges = learn_merges([spell(word, alphabet) for word in list_words()])
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet[byte] for byte in range(256))}
    for a, b in merges:
        vocabulary.setdefault(a + b, len(vocabulary))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=131072,
        padding_side="right",
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Also writes vocab.json and merges.txt, which transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def list_words() -> list[str]:
    """Words in lower, title and upper case, first bare and then after a space."""
    rng = random.Random(0)
    texts = [TEMPLATE, *NEGATIVES, *MORE_WORDS]
    texts += [write_caption(sample_scene(rng), rng).text for _ in range(20_000)]
    found = {word.lower() for text in texts for word in re.findall("[A-Za-z]+", text)}
    ordered = sorted(found, key=lambda word: (len(word), word))
    cased = [form for word in ordered for form in (word, word.title(), word.upper())]
    return list(dict.fromkeys(cased + [" " + word for word in cased]))


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges, most important first, after which each word is one token.

    A word is encoded with the merges so far and then joined from left to right. Later merges rank lower, so
    they never change how an earlier word is built.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = apply_merges(list(word), ranks)
        while len(parts) > 1:
            ranks.setdefault((parts[0], parts[1]), len(ranks))
            parts[:2] = [parts[0] + parts[1]]
    return list(ranks)


def apply_merges(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(parts) > 1:
        pairs = [
            (ranks.get((a, b), len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        ]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spell(text: str, alphabet: dict[int, str]) -> str:
    return "".join(alphabet[byte] for byte in text.encode())


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte, as byte-level vocabularies write them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
