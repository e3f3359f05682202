"""Fused operations of the transformer and the autoencoder for NVIDIA GPUs.

Each file holds one subject: the reference in plain torch, which says what is computed and serves every
other device, the Triton kernel, and the public operation. The files import Triton, this one does not.

| file | operation |
|---|---|
| norm.py | gate + residual + LayerNorm + modulation in one pass over the tokens |
| rope.py | RMSNorm of queries and keys + rotary positions, in place in a joint [text; image] buffer |
| matmul.py | linear layers written into given memory, with GELU at the end of the matrix product |
| rows.py, quantized.py, int8.py | values in 8 bits: their meaning, quantising, products |
| norm_backward.py, rope_backward.py, attention_backward.py | gradients |
| vae_norm.py, vae_attention.py | the autoencoder's norms with what is added before, and its one wide head |
| launch.py | how all of them are launched |
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "reference", "off")
# tests/test_fused_gpu.py passed and benchmarks/transformer.py ran on an H100 (see benchmarks/LOG.md).
ON_BY_DEFAULT = True
_OLDEST = (8, 0)  # Ampere: the first with bf16 arithmetic


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What computes the fused operations on a device.

    Attributes:
        name: "triton": the kernels; "reference": the fused path with plain torch operations (for tests);
            "off": the transformer's plain path.
        reason: why, for people.
    """

    name: str
    reason: str


_chosen_by_hand: str | None = None


def backend(device: torch.device) -> Backend:
    """The backend for tensors on `device`: chosen once per device, unless one was set by hand."""
    if _chosen_by_hand in (None, "auto"):
        return _choose(device, _chosen_by_hand == "auto" or ON_BY_DEFAULT)
    return Backend(name=_chosen_by_hand, reason="set by hand")


def set_backend(name: str | None) -> None:
    """Say which backend computes from now on, in the whole process.

    Args:
        name: "auto": Triton where the device allows it, the plain path elsewhere; "triton", "reference" or
            "off" on every device, see `Backend`; None: the default.

    Raises:
        ValueError: if there is no such backend, or Triton is not installed.
    """
    global _chosen_by_hand
    if name is not None and name not in BACKENDS:
        raise ValueError(f"There is no backend {name!r}. Choose one of {', '.join(BACKENDS)}, or None.")
    if name == "triton" and not triton_is_installed():
        raise ValueError("Triton is not installed: pip install triton, or choose another backend.")
    _chosen_by_hand = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """`set_backend` for the duration of a `with` block."""
    global _chosen_by_hand
    before = _chosen_by_hand
    set_backend(name)
    try:
        yield
    finally:
        _chosen_by_hand = before


@lru_cache(maxsize=1)
def triton_is_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return find_spec("triton") is not None


def triton_can_build() -> bool:
    """Whether Triton finds the C compiler that it needs on Linux for what launches kernels."""
    if sys.platform != "linux":
        return True
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


@lru_cache(maxsize=64)
def _choose(device: torch.device, wanted: bool) -> Backend:
    if device.type != "cuda":
        return Backend(name="off", reason=f"the device is {device.type}, not an NVIDIA GPU")
    if torch.version.hip is not None:
        return Backend(name="off", reason="ROCm: the kernels were never run on it")
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        found = ".".join(map(str, capability))
        return Backend(name="off", reason=f"compute capability {found}; the kernels need 8.0 or newer")
    if not triton_is_installed():
        return Backend(name="off", reason="Triton is not installed (pip install triton)")
    if not triton_can_build():
        return Backend(name="off", reason="Triton needs a C compiler; install gcc or clang")
    if not wanted:
        reason = "not on by default yet; diffusers_qwenimage.kernels.set_backend('auto') switches it on"
        return Backend(name="off", reason=reason)
    return Backend(name="triton", reason=f"{torch.cuda.get_device_name(device)} with Triton")
