"""The canonical form of a LoRA file: a list of weight changes, each with its tensors and its scale.

Whatever a file calls its keys, `read.py` turns it into `LoraUpdate`s and `convert.py` writes them out again.
An update never holds data: it holds `StoredTensor`s that read one tensor at a time, so a 1 GB file costs the
memory of its largest tensor. Nothing here knows how a key is spelled.

Formulas (W is the weight, [out, in]; s is the scale):

    lora    W + s * up @ down
    dora    m * (W + s * up @ down) / |W + s * up @ down|, the norm per output row or per input column
    lokr    W + s * kron(w1, w2), each w whole or a product of w_a and w_b
    loha    W + s * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise
    diff    W + diff, for a weight of any shape;  diff_b    bias + diff_b
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal[
    "lora", "dora", "lokr", "loha", "diff", "diff_b", "embedding", "glora", "oft", "ia3", "set_weight"
]
ScaleSource = Literal["key", "metadata", "adapter_config", "default"]
Component = Literal["transformer", "text_encoder"]

# The canonical roles of each kind: those that must be there, then those that may.
LORA_ROLES = ("down", "up")
LOKR_ROLES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that is read when it is needed; `key` is its name in the file that it comes from."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor] = field(repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def renamed(self, key: str) -> "StoredTensor":
        """The same data under another name."""
        return StoredTensor(key=key, dtype=self.dtype, shape=self.shape, load=self.load)


def stored(key: str, tensor: Tensor) -> StoredTensor:
    """Wrap a tensor that is in memory."""
    return StoredTensor(key=key, dtype=tensor.dtype, shape=tuple(tensor.shape), load=lambda: tensor)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The factor in front of an update: `alpha / rank`, or `alpha / sqrt(rank)` with rank-stabilised LoRA.

    `alpha` is None when only the header of a file was read and the number is in the data.
    """

    alpha: float | None
    rank: int
    source: ScaleSource
    rslora: bool = False

    @property
    def value(self) -> float:
        """The factor; raises ValueError when only the header was read."""
        if self.alpha is None:
            raise ValueError("The alpha of this update is in the file's data, and only its header was read.")
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def exact(self) -> Fraction | None:
        """The factor as a fraction; None where it is irrational (rslora at a rank that is not a square).

        Raises:
            ValueError: if only the header of the file was read, and the alpha is in its data.
        """
        if self.alpha is None:
            raise ValueError("The alpha of this update is in the file's data, and only its header was read.")
        if not self.rslora:
            return Fraction(self.alpha) / self.rank
        root = math.isqrt(self.rank)
        return Fraction(self.alpha) / root if root * root == self.rank else None

    @property
    def is_one(self) -> bool:
        """Whether the factor is known and exactly 1."""
        return self.alpha is not None and self.exact == 1


def unit_scale(rank: int = 1) -> Scale:
    """The scale of an update whose file states none: alpha equals rank."""
    return Scale(alpha=float(rank), rank=rank, source="default")


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """One change of one module.

    Attributes:
        module: canonical path, as in diffusers: `"transformer_blocks.0.attn.to_q"`.
        kind: what the tensors mean, see the formulas above.
        tensors: by canonical role: down, up, up_bias, magnitude, alpha, lokr_*, hada_*, diff, diff_b, ...
        scale: the factor and where it was found.
        format: name of the `Format` that the file used for this module.
        component: the model that the module belongs to.
    """

    module: str
    kind: Kind
    tensors: Mapping[str, StoredTensor]
    scale: Scale
    format: str
    component: Component = "transformer"

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None for kinds that have none (full factors, differences)."""
        for role, axis in _RANK_AXES:
            if role in self.tensors:
                return self.tensors[role].shape[axis]
        return None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the change, [out, in] for linears; None where it cannot be told without the weight."""
        return change_shape(self.kind, self.tensors)

    @property
    def magnitude_axis(self) -> Literal["output", "input"] | None:
        """The axis that a DoRA magnitude belongs to; None when there is no magnitude."""
        if "magnitude" not in self.tensors:
            return None
        shape = self.tensors["magnitude"].shape
        return "input" if len(shape) == 2 and shape[0] == 1 and shape[1] != 1 else "output"

    def load(self, role: str) -> Tensor:
        """Read the tensor of a role; raises ValueError if it holds NaN or infinity."""
        return load_finite(self.tensors[role])


def load_finite(tensor: StoredTensor) -> Tensor:
    """Read a tensor; raises ValueError if it holds NaN or infinity."""
    data = tensor.load()
    if not all_finite(data):
        raise ValueError(f"{tensor.key} holds NaN or infinity; the file is damaged or its training diverged.")
    return data


def all_finite(data: Tensor) -> bool:
    """Whether no number is NaN or infinite, from the exponent bits: one quick pass in any type."""
    if data.dtype not in EXPONENTS or not data.numel():
        return True  # integers
    integer, mask = EXPONENTS[data.dtype]
    bits = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().view(integer)
    return bool(np.bitwise_and(bits, mask).max() != mask)


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same type, number of elements and bits."""
    if first.dtype != second.dtype or first.numel() != second.numel():
        return False
    one, two = (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)
    )
    return one.numpy().tobytes() == two.numpy().tobytes()


def change_shape(kind: Kind, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    """The shape of the change that the tensors of an update describe, from their shapes alone."""
    shapes = {role: tensor.shape for role, tensor in tensors.items()}
    match kind:
        case "lora" | "dora":
            return shapes["up"][0], shapes["down"][1]
        case "embedding":
            return shapes["embedding_down"][1], shapes["embedding_up"][0]
        case "lokr":
            first, second = (_lokr_factor_shape(shapes, name) for name in ("lokr_w1", "lokr_w2"))
            return first[0] * second[0], first[1] * second[1]
        case "loha":
            return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
        case "diff" | "diff_b":
            return shapes[kind]
        case _:
            return None


def _lokr_factor_shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    return shapes[name] if name in shapes else (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1])


# An unsigned integer of the size of each type, and the exponent bits, which are all set in NaN and infinity
# (E4M3 has no infinity; its NaN has all bits set but the sign).
EXPONENTS: dict[torch.dtype, tuple[type[np.unsignedinteger], int]] = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
    torch.float8_e5m2: (np.uint8, 0x7C),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
}
# Where the rank is found, in the order in which LyCORIS looks for it.
_RANK_AXES = (("down", 0), ("embedding_down", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("hada_w1_b", 0))
