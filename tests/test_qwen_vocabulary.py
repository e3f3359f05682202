"""Prompts with the real vocabulary of 151,643 tokens: the published ids, and the embeddings stock makes."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from components import scheduler, transformers, vaes
from model_files import tiny_text_encoder
from qwen_vocabulary import qwen_tokenizer

from diffusers_qwenimage.prompt import TEXT_TO_IMAGE, PromptEncoder, pad

SAMPLES = json.loads((Path(__file__).parent / "data" / "qwen_token_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return qwen_tokenizer()


@pytest.mark.parametrize("sample", SAMPLES["samples"], ids=lambda sample: ascii(sample["text"][:20]))
def test_ids_are_the_published_ones(tokenizer, sample):
    assert tokenizer(sample["text"])["input_ids"] == sample["ids"]


def test_prefix_of_the_template(tokenizer):
    ids = tokenizer(TEXT_TO_IMAGE.text.format("a cat"))["input_ids"]
    assert tokenizer.decode(ids[TEXT_TO_IMAGE.prefix_tokens :]).startswith("a cat<|im_end|>")


def test_embeddings_equal_those_of_diffusers(tokenizer):
    text_encoder = tiny_text_encoder(151_936).eval()
    _, vae = vaes()
    _, transformer = transformers()
    stock = diffusers.QwenImagePipeline(scheduler(), vae, text_encoder, tokenizer, transformer)
    prompts = [sample["text"] for sample in SAMPLES["samples"]]
    expected, mask = stock.encode_prompt(prompts, device=torch.device("cpu"))
    got, our_mask = pad(PromptEncoder().encode(text_encoder, tokenizer, prompts, device=torch.device("cpu")))
    assert torch.equal(mask, our_mask)
    assert (got - expected).abs().max() < 1e-5  # stock pads the batch: other shapes, other rounding
