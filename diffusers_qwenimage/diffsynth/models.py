"""`ModelConfig`s -> models: what a file holds is told by its keys."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_qwenimage.checkpoint import Checkpoint, ComponentName, find_components, open_checkpoint
from diffusers_qwenimage.loading import load_text_encoder, load_tokenizer, load_transformer, load_vae
from diffusers_qwenimage.pipelines.text_survey import language_layers
from diffusers_qwenimage.quantize import quantize_

from .model_config import ModelConfig

logger = logging.getLogger(__name__)

LOADERS: Mapping[ComponentName, Callable[..., Any]] = {
    "transformer": load_transformer,
    "text_encoder": load_text_encoder,
    "vae": load_vae,
}
# offload_dtype -> how it is stored: scaled. A plain cast, as in DiffSynth-Studio, loses small weights.
STORED_AS = {torch.float8_e4m3fn: "fp8-storage"}
# Attribute of the pipeline -> where its files lie in a repository of diffusers' layout.
PATTERNS = {
    "dit": "transformer/diffusion_pytorch_model*.safetensors",
    "text_encoder": "text_encoder/model*.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "tokenizer": "tokenizer/",
}


def load_models(
    configs: Sequence[ModelConfig], *, dtype: torch.dtype, device: torch.device
) -> dict[ComponentName, Any]:
    """Load all models of `configs` to `device`; those with an `offload_device` go there instead, and those
    that are stored in another type wait on the CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        DownloadError: if a hub cannot deliver.
        ValueError: if a file is not recognised, two files hold the same model, or one cannot be stored so.
    """
    if isinstance(configs, ModelConfig):
        raise ValueError("model_configs must be a list of ModelConfig, got a single one.")
    parts: dict[ComponentName, tuple[Checkpoint, ModelConfig]] = {}
    for config in configs:
        for checkpoint in _checkpoints(config):
            for name, part in find_components(checkpoint).items():
                if name in parts:
                    raise ValueError(
                        f"The {name} comes twice: from {parts[name][0].files[0]} and from {part.files[0]}. "
                        "Give one ModelConfig per model, with all its files."
                    )
                parts[name] = (part, config)
    return {name: _load(name, part, config, dtype, device) for name, (part, config) in parts.items()}


def find_tokenizer(config: ModelConfig) -> Any:
    """The checked tokenizer of a folder.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not Qwen's.
    """
    first = config.find()[0][0]
    return load_tokenizer(first if first.is_dir() or not first.is_file() else first.parent)


def lora_file(source: ModelConfig | str | Path) -> Path:
    """The LoRA file that is meant, on the disk afterwards; raises ValueError if it is not one file."""
    if not isinstance(source, ModelConfig):
        return Path(source)
    files = [file for group in source.find() for file in group if file.suffix == ".safetensors"]
    if len(files) != 1:
        raise ValueError(f"The ModelConfig of a LoRA must name one .safetensors file, it names {len(files)}.")
    return files[0]


def _checkpoints(config: ModelConfig) -> list[Checkpoint]:
    """One checkpoint per group of files. A whole repository also holds files that are no weights."""
    if config.path is not None:
        return [open_checkpoint(config.path)]
    groups: list[list[Path]] = [
        [file for file in group if file.suffix == ".safetensors"] for group in config.find()
    ]
    if not any(groups):
        raise ValueError(
            f"{config.origin_file_pattern!r} of {config.model_id} holds no .safetensors file; name weights, "
            f"such as {PATTERNS['dit']!r}."
        )
    return [open_checkpoint(group) for group in groups if group]


def _load(
    name: ComponentName, part: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Any:
    stored = config.offload_dtype
    if stored is None or stored == dtype:
        where = device if config.offload_device is None else torch.device(config.offload_device)
        return LOADERS[name](part, dtype=dtype, device=where)
    if stored not in STORED_AS:
        raise ValueError(
            f"offload_dtype of the {name} is {stored}; it can be {', '.join(map(str, STORED_AS))} (scaled "
            f"per output channel), or the type that is computed in, {dtype}."
        )
    model = LOADERS[name](part, dtype=dtype, device="cpu")  # views of the mapped files
    if name == "vae":
        logger.info("The VAE has no linear layers; it stays in %s.", dtype)
        return model
    for block in model.transformer_blocks if name == "transformer" else language_layers(model):
        block.to(device)
        quantize_(block, STORED_AS[stored])
        block.to("cpu")
    return model
