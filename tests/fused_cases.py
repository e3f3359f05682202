"""What the tests of the kernels share: where they run, types and tolerances."""

import os

import components
import pytest
import torch

from diffusers_qwenimage.kernels import triton_is_installed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = "triton"


def interpreted_or_gpu():
    """Whether Triton kernels can run here: on a GPU, or in the interpreter (see conftest.py)."""
    if not triton_is_installed():
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


needs_triton = pytest.mark.skipif(not interpreted_or_gpu(), reason="Triton is not installed here")


def random(*shape, dtype=torch.float32, seed=0):
    return components.random(*shape, seed=seed, dtype=dtype).to(DEVICE)


def relative(got, expected):
    """||got - expected|| / ||expected||."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def tolerance(dtype):
    """One result in a few may be rounded the other way; fp32 sums are added in another order.

    Triton's interpreter cuts off to bf16 where the GPU rounds: up to 2^-8 each time, up to three times.
    """
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        return 1.2e-2
    return {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
