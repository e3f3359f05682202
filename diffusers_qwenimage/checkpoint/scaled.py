"""8-bit weights that carry a scale: applied exactly where the convention is known, refused where it is not.

Known, for a layer L with `L.weight` in float8_e4m3fn or float8_e5m2:

* `L.scale_weight` with a marker tensor `scaled_fp8` (ComfyUI 2024-2025, musubi-tuner), or
  `L.weight_scale` (newer ComfyUI, with `L.comfy_quant` = JSON bytes such as {"format": "float8_e4m3fn"});
* weight = fp8 * scale, where the scale is one number, one per output row ([out, 1]) or one per block of a row
  ([out, blocks, 1]);

and in int8, where `L.comfy_quant` says "int8_tensorwise", with one scale or one per output row; its columns
are rotated back by blocks if the settings hold "convrot" (kernels/rows.py has the matrix).

`L.scale_input` and `L.input_scale` belong to activations of fp8 matrix products, not to the weight, and are
not used. Everything else (nvfp4, mxfp8, int4, two-level scales) is refused: a wrong guess would load without
a word and draw noise.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_qwenimage.kernels.rows import rotate_blocks

from .config import ZERO_COND_MARKER
from .reader import Checkpoint, StoredTensor, quote

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F16", "BF16", "F32", "F64")
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
UNUSED_SUFFIXES = (".scale_input", ".input_scale")
MARKERS = ("scaled_fp8", ZERO_COND_MARKER)
QUANT_SUFFIX = ".comfy_quant"
QUANT_METADATA = "_quantization_metadata"
KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
INT8_FORMAT = "int8_tensorwise"
# Settings of a format that do not change the meaning of the stored weight.
HARMLESS_SETTINGS = ("format", "full_precision_matrix_mult", "per_row", "orig_dtype", "orig_shape")
ROTATION_SETTINGS = ("convrot", "convrot_groupsize")
REFUSED = re.compile(
    r"\.(?:weight_scale_2|weight_scale_inv|weight_s_rel|weight_s_channel|weight_codebook|qweight|qzeros|absmax"
    r"|quant_map|quant_state\..*|weight_zero_point|smooth_factor|smooth|wscales|wtscale|weight_packed)"
)


@dataclass(frozen=True, kw_only=True)
class ScaledCheckpoint:
    """Weights under their module names, and the scale of those that have one.

    Attributes:
        weights: tensors by name.
        scales: weight -> its scale.
        rotations: weight -> size of the blocks in which its columns are rotated.
    """

    weights: Checkpoint
    scales: Mapping[str, StoredTensor]
    rotations: Mapping[str, int] = field(default_factory=dict)


def split_scales(checkpoint: Checkpoint) -> ScaledCheckpoint:
    """Separate weights from scales and remarks, and check that every convention in the file is known.

    Raises:
        ValueError: if the file is quantised in a way that is not known, or a scale does not fit its weight.
    """
    formats = _known_formats(checkpoint)
    scales: dict[str, StoredTensor] = {}
    dropped = {name for name in checkpoint.tensors if name in MARKERS or name.endswith(UNUSED_SUFFIXES)}
    for name, stored in checkpoint.tensors.items():
        suffix = next((suffix for suffix in SCALE_SUFFIXES if name.endswith(suffix)), None)
        if suffix:
            weight = f"{name.removesuffix(suffix)}.weight"
            _check_scale(checkpoint, weight, name, formats)
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
    rotations = {
        f"{layer}.weight": int(settings.get("convrot_groupsize", 256))
        for layer, settings in formats.items()
        if settings.get("convrot")
    }
    return ScaledCheckpoint(weights=weights, scales=scales, rotations=rotations)


def apply_scale(weight: Tensor, scale: Tensor, rotation: int = 0) -> Tensor:
    """weight * scale in float32; `scale` has one element, or the shape [out, 1] or [out, blocks, 1].

    With `rotation`, the columns of the product are rotated back by blocks of this size.
    """
    values = weight.float()
    factors = scale.float()
    if factors.numel() == 1:
        return rotate_blocks(values * factors.reshape(()), rotation)
    if factors.ndim == 2:
        return rotate_blocks(values * factors, rotation)
    blocks = values.reshape(factors.shape[0], factors.shape[1], -1) * factors
    return blocks.reshape(weight.shape)


def _check_scale(
    checkpoint: Checkpoint, weight: str, scale: str, formats: Mapping[str, Mapping[str, Any]]
) -> None:
    stored = checkpoint.tensors.get(weight)
    entry = checkpoint.tensors[scale].entry
    file = checkpoint.tensors[scale].file
    if stored is None:
        raise ValueError(f"{file}: {scale!r} is the scale of {weight!r}, which is not there.")
    is_int8 = formats.get(weight.removesuffix(".weight"), {}).get("format") == INT8_FORMAT
    if stored.entry.dtype not in (("I8",) if is_int8 else FLOAT8) or entry.dtype not in FLOATS:
        raise _unknown(checkpoint, f"{weight!r} is {stored.entry.dtype} with a scale of type {entry.dtype}")
    shape, factors = stored.entry.shape, entry.shape
    per_tensor = factors in ((), (1,), (1, 1))
    per_row = len(shape) == 2 and factors == (shape[0], 1)
    per_block = len(shape) == 2 and len(factors) == 3 and factors[::2] == (shape[0], 1)
    if per_tensor or per_row or (not is_int8 and per_block and factors[1] > 0 and shape[1] % factors[1] == 0):
        return
    raise _unknown(checkpoint, f"{weight!r} of shape {shape} has a scale of shape {factors}")


def _known_formats(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Layer -> settings, of the layers that the file says something about."""
    odd = [name for name in checkpoint.tensors if REFUSED.search(name)]
    if odd:
        raise _unknown(checkpoint, f"it holds {quote(odd, limit=3)}")
    formats = _metadata_formats(checkpoint.metadata)
    marked = [name for name in checkpoint.tensors if name.endswith(QUANT_SUFFIX)]
    for name, value in checkpoint.select(marked).read():
        text = bytes(value.flatten().view(torch.uint8).tolist()) or b"null"
        formats[name.removesuffix(QUANT_SUFFIX)] = json.loads(text)
    for name, settings in formats.items():
        if not _is_known(settings):
            raise _unknown(checkpoint, f"{name!r} is in the format {settings}")
    int8 = {f"{name}.weight" for name, settings in formats.items() if settings["format"] == INT8_FORMAT}
    for name in int8:
        if name.replace(".weight", ".weight_scale") not in checkpoint.tensors:
            raise _unknown(checkpoint, f"{name!r} is int8 without a scale")
    packed = [
        name
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and stored.entry.dtype not in FLOAT8 + FLOATS and name not in int8
    ]
    if packed:
        raise _unknown(checkpoint, f"{packed[0]!r} has the type {checkpoint.tensors[packed[0]].entry.dtype}")
    return formats


def _is_known(settings: Any) -> bool:
    if not isinstance(settings, dict) or settings.get("format") not in KNOWN_FORMATS:
        return False
    is_int8 = settings["format"] == INT8_FORMAT
    known = HARMLESS_SETTINGS + (ROTATION_SETTINGS if is_int8 else ())
    return not any(value and key not in known for key, value in settings.items())


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
        "float8_e4m3fn and float8_e5m2, those scaled per tensor, row or block, and int8_tensorwise; take "
        "such a file or the bf16 one."
    )
