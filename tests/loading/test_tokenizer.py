"""The tokenizer is checked at load, where transformers says nothing."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import Qwen2Tokenizer

from diffusers_qwenimage.loading import check_tokenizer, load_tokenizer
from diffusers_qwenimage.prompt import TEXT_TO_IMAGE


def test_transformers_accepts_an_empty_folder(tmp_path: Path) -> None:
    """The trap that the checks are for; if this fails, transformers has changed."""
    assert len(Qwen2Tokenizer.from_pretrained(str(tmp_path))) < 10


def test_a_good_tokenizer_loads(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder / "tokenizer")
    stock = Qwen2Tokenizer.from_pretrained(model_folder / "tokenizer")
    text = TEXT_TO_IMAGE.text.format("three green triangles \u00e9\u4e2d <|im_end|>")
    assert tokenizer(text).input_ids == stock(text).input_ids
    assert len(tokenizer(TEXT_TO_IMAGE.text.split("{}")[0]).input_ids) == 34


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"needs tokenizer\.json, or vocab\.json with merges\.txt"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not know <\|im_start\|>"):
        check_tokenizer(Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]))


def test_a_prefix_of_another_length_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = []  # every letter is a token now
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"makes \d+ tokens of the chat template's prefix instead of 34"):
        load_tokenizer(tmp_path / "tokenizer")
