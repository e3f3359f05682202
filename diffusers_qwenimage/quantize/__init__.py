"""Weights in 8 bits, with products in 8 bits or in the type of the model.

    quantize_(transformer, "fp8")                                       # in place
    quantize_checkpoint(QwenImageTransformer2DModel, folder, target, "fp8")     # files, tensor by tensor
    QwenImageTransformer2DModel.from_single_file(file, weights="fp8")   # fp8 files are taken as they are

Kinds: "fp8", "int8", "fp8-storage"; see `quantize_`. A quantised layer is a `QuantizedLinear`: its weight, a
scale per output channel and its bias are plain tensors that may be moved or replaced at any time.
"""

from .apply import MODULATION, OUTSIDE_BLOCKS, SKIPPED, is_quantized, quantize_
from .files import load_quantized, quantize_checkpoint, write_single_file
from .layers import KINDS, QuantizedLinear

__all__ = [
    "KINDS",
    "MODULATION",
    "OUTSIDE_BLOCKS",
    "SKIPPED",
    "QuantizedLinear",
    "is_quantized",
    "load_quantized",
    "quantize_",
    "quantize_checkpoint",
    "write_single_file",
]
