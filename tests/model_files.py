"""A tiny random Qwen-Image on disk, written by stock diffusers and transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffusers_qwenimage.loading.components import PUBLISHED_SCHEDULER
from diffusers_qwenimage.prompt import TEXT_TO_IMAGE

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TRANSFORMER = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
# Head size and RoPE axes of the published model, so that the config can be told from the shapes.
PUBLISHED_HEADS = {"attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56)}
VAE = {"base_dim": 8, "num_res_blocks": 1}


def tiny_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(1)
    return QwenImageTransformer2DModel(**{**TRANSFORMER, **changes})


def tiny_vae(**changes: Any) -> AutoencoderKLQwenImage:
    torch.manual_seed(2)
    return AutoencoderKLQwenImage(**{**VAE, **changes})


def tiny_text_encoder(vocabulary: int, **changes: Any) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(3)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": vocabulary,
            "bos_token_id": None,
            "eos_token_id": 0,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "rope_theta": 1_000_000.0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
        **changes,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer that knows the words of the chat template, each as one token, as Qwen's does."""
    empty = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    texts = TEXT_TO_IMAGE.text
    for token in SPECIAL_TOKENS:
        texts = texts.replace(token, "\0")
    trained.train_from_iterator(texts.split("\0"), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, pad_token="<|endoftext|>")
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def write_model(folder: Path, *, dtype: torch.dtype = torch.float32, **transformer: Any) -> Path:
    """A whole pipeline in diffusers' layout."""
    tokenizer = tiny_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**PUBLISHED_SCHEDULER),
        vae=tiny_vae().to(dtype),
        text_encoder=tiny_text_encoder(len(tokenizer)).to(dtype),
        tokenizer=tokenizer,
        transformer=tiny_transformer(**transformer).to(dtype),
    )
    pipeline.save_pretrained(folder)
    return folder
