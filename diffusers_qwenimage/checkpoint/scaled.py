"""FP8 weights that carry a scale: applied exactly where the convention is known, refused where it is not.

Known, for a layer L with `L.weight` in float8_e4m3fn or float8_e5m2:

* `L.scale_weight` with a marker tensor `scaled_fp8` (ComfyUI 2024-2025, musubi-tuner), or
  `L.weight_scale` (newer ComfyUI, with `L.comfy_quant` = JSON bytes such as {"format": "float8_e4m3fn"});
* weight = fp8 * scale, where the scale is one number, one per output row ([out, 1]) or one per block of a row
  ([out, blocks, 1]).

`L.scale_input` and `L.input_scale` belong to activations of fp8 matrix products, not to the weight, and are
not used. Everything else (nvfp4, mxfp8, int8, int4, rotated weights, two-level scales) is refused: a wrong
guess would load without a word and draw noise.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import ZERO_COND_MARKER
from .reader import Checkpoint, StoredTensor, quote

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F16", "BF16", "F32", "F64")
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
UNUSED_SUFFIXES = (".scale_input", ".input_scale")
MARKERS = ("scaled_fp8", ZERO_COND_MARKER)
QUANT_SUFFIX = ".comfy_quant"
QUANT_METADATA = "_quantization_metadata"
KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2")
# Settings of a format that do not change the meaning of the stored weight.
HARMLESS_SETTINGS = ("format", "full_precision_matrix_mult")
REFUSED = re.compile(
    r"\.(?:weight_scale_2|weight_scale_inv|weight_s_rel|weight_s_channel|weight_codebook|qweight|qzeros|absmax"
    r"|quant_map|quant_state\..*|weight_zero_point|smooth_factor|smooth|wscales|wtscale|weight_packed)"
)


@dataclass(frozen=True, kw_only=True)
class ScaledCheckpoint:
    """Weights under their module names, and the scale of those that have one."""

    weights: Checkpoint
    scales: Mapping[str, StoredTensor]


def split_scales(checkpoint: Checkpoint) -> ScaledCheckpoint:
    """Separate weights from scales and remarks, and check that every convention in the file is known.

    Raises:
        ValueError: if the file is quantised in a way that is not known, or a scale does not fit its weight.
    """
    _refuse_unknown(checkpoint)
    scales: dict[str, StoredTensor] = {}
    dropped = {name for name in checkpoint.tensors if name in MARKERS or name.endswith(UNUSED_SUFFIXES)}
    for name, stored in checkpoint.tensors.items():
        suffix = next((suffix for suffix in SCALE_SUFFIXES if name.endswith(suffix)), None)
        if suffix:
            weight = f"{name.removesuffix(suffix)}.weight"
            _check_scale(checkpoint, weight, name)
            if weight in scales:
                raise ValueError(f"{stored.file}: {weight!r} has two scales, {quote(SCALE_SUFFIXES)}.")
            scales[weight] = stored
            dropped.add(name)
    dropped |= {name for name in checkpoint.tensors if name.endswith(QUANT_SUFFIX)}
    weights = checkpoint.select(name for name in checkpoint.tensors if name not in dropped)
    if scales or "scaled_fp8" in checkpoint.tensors:
        bare = [name for name, t in weights.tensors.items() if t.entry.dtype in FLOAT8 and name not in scales]
        if bare:
            raise ValueError(
                f"{checkpoint.files[0]} holds scaled fp8 weights, but no scale for {quote(bare)}. "
                "The file is incomplete; fetch it again or take the bf16 one."
            )
    return ScaledCheckpoint(weights=weights, scales=scales)


def apply_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale in float32; `scale` has one element, or the shape [out, 1] or [out, blocks, 1]."""
    values = weight.float()
    factors = scale.float()
    if factors.numel() == 1:
        return values * factors.reshape(())
    if factors.ndim == 2:
        return values * factors
    blocks = values.reshape(factors.shape[0], factors.shape[1], -1) * factors
    return blocks.reshape(weight.shape)


def _check_scale(checkpoint: Checkpoint, weight: str, scale: str) -> None:
    stored = checkpoint.tensors.get(weight)
    entry = checkpoint.tensors[scale].entry
    file = checkpoint.tensors[scale].file
    if stored is None:
        raise ValueError(f"{file}: {scale!r} is the scale of {weight!r}, which is not there.")
    if stored.entry.dtype not in FLOAT8 or entry.dtype not in FLOATS:
        raise _unknown(checkpoint, f"{weight!r} is {stored.entry.dtype} with a scale of type {entry.dtype}")
    shape, factors = stored.entry.shape, entry.shape
    per_tensor = factors in ((), (1,), (1, 1))
    per_row = len(shape) == 2 and factors == (shape[0], 1)
    per_block = len(shape) == 2 and len(factors) == 3 and factors[::2] == (shape[0], 1)
    if per_tensor or per_row or (per_block and factors[1] > 0 and shape[1] % factors[1] == 0):
        return
    raise _unknown(checkpoint, f"{weight!r} of shape {shape} has a scale of shape {factors}")


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    odd = [name for name in checkpoint.tensors if REFUSED.search(name)]
    if odd:
        raise _unknown(checkpoint, f"it holds {quote(odd, limit=3)}")
    formats = _metadata_formats(checkpoint.metadata)
    marked = [name for name in checkpoint.tensors if name.endswith(QUANT_SUFFIX)]
    for name, value in checkpoint.select(marked).read():
        formats[name] = json.loads(bytes(value.flatten().view(torch.uint8).tolist()) or b"null")
    for name, settings in formats.items():
        known = isinstance(settings, dict) and settings.get("format") in KNOWN_FORMATS
        if not known or any(value and key not in HARMLESS_SETTINGS for key, value in settings.items()):
            raise _unknown(checkpoint, f"{name!r} is in the format {settings}")
    packed = [
        name
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and stored.entry.dtype not in FLOAT8 + FLOATS
    ]
    if packed:
        raise _unknown(checkpoint, f"{packed[0]!r} has the type {checkpoint.tensors[packed[0]].entry.dtype}")


def _metadata_formats(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Layer -> settings, from the header's quantisation record."""
    if QUANT_METADATA not in metadata:
        return {}
    try:
        record = json.loads(metadata[QUANT_METADATA])
    except json.JSONDecodeError as error:
        raise ValueError(f"The header's {QUANT_METADATA} is not JSON ({error}).") from error
    layers = record.get("layers") if isinstance(record, dict) else None
    if not isinstance(layers, dict):
        raise ValueError(f"The header's {QUANT_METADATA} names no layers; what the weights mean is unknown.")
    return dict(layers)


def _unknown(checkpoint: Checkpoint, reason: str) -> ValueError:
    return ValueError(
        f"{checkpoint.files[0]} is quantised in a way that is not supported: {reason}. Supported are plain "
        "float8_e4m3fn and float8_e5m2, and those scaled per tensor, row or block; take such a file or the "
        "bf16 one."
    )
