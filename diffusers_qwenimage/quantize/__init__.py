"""Weights in 8 bits, with products in 8 bits or in the type of the model.

    quantize_(transformer, "fp8")

Kinds: "fp8", "int8", "fp8-storage"; see `quantize_`. A quantised layer is a `QuantizedLinear`: its weight, a
scale per output channel and its bias are plain tensors that may be moved or replaced at any time.
"""

from .apply import MODULATION, OUTSIDE_BLOCKS, SKIPPED, is_quantized, quantize_
from .layers import KINDS, QuantizedLinear

__all__ = ["KINDS", "MODULATION", "OUTSIDE_BLOCKS", "SKIPPED", "QuantizedLinear", "is_quantized", "quantize_"]
