"""Components whose large weights are still in their files, to be read straight to where they will live."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_qwenimage.checkpoint import Checkpoint
from diffusers_qwenimage.loading import (
    check_index,
    load_scheduler,
    load_tokenizer,
    load_vae,
    model_folder,
    open_text_encoder,
    open_transformer,
    state_dtype,
)
from diffusers_qwenimage.quantize import KINDS, quantize_

PLAIN = ("bf16", "fp16", "fp32")
WEIGHTS = (*PLAIN, *KINDS)  # what `weights=` can be
PLAIN_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of `from_pretrained`, those that lead here.
ARGUMENTS = ("vram_limit", "vram_buffer", "weights", "device", "stream_from")


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Components of a pipeline.

    Attributes:
        components: by name; those named in `files` are on the meta device.
        files: the weights that belong to them.
    """

    components: Mapping[str, Any]
    files: Mapping[str, Checkpoint]


def open_components(
    source: str | Path,
    *,
    dtype: torch.dtype,
    weights: str | None,
    given: Mapping[str, Any],
    revision: str | None = None,
    local_only: bool = False,
) -> Waiting:
    """The components of a model in diffusers' layout; only headers and small parts are read.

    Args:
        source: as of `load_components`.
        dtype: of the weights.
        weights: "fp8", "int8" or "fp8-storage" to quantise the transformer on its way; None for none.
        given: components that are there already, by name.

    Raises:
        FileNotFoundError, DownloadError, ValueError: as of `load_components`.
    """
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    dtype = PLAIN_TYPES.get(weights or "", dtype)
    folder = model_folder(source, revision=revision, local_only=local_only)
    check_index(folder)
    components, files = dict(given), {}
    if "transformer" not in given:
        transformer, files["transformer"] = open_transformer(folder / "transformer")
        _cast_parameters(transformer, dtype)
        if weights in KINDS:
            quantize_(transformer, weights)
        components["transformer"] = transformer
    if "text_encoder" not in given:
        text_encoder, files["text_encoder"] = open_text_encoder(folder / "text_encoder")
        if getattr(text_encoder, "all_tied_weights_keys", None):
            text_encoder.tie_weights()  # on meta every parameter was its own
        _cast_parameters(text_encoder, dtype)
        components["text_encoder"] = state_dtype(text_encoder)
    if "vae" not in given:
        components["vae"] = load_vae(folder / "vae", dtype=dtype)
    if "tokenizer" not in given:
        components["tokenizer"] = load_tokenizer(folder / "tokenizer")
    if "scheduler" not in given:
        components["scheduler"] = load_scheduler(folder / "scheduler")
    return Waiting(components=components, files=files)


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """On the meta device. Buffers, such as rotary frequencies, keep their type."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
