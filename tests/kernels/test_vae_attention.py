import pytest
import torch
from fused_cases import DEVICE, TRITON, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.kernels.vae_attention import Tile, why_not, wide_attention, wide_attention_reference

# Triton's interpreter multiplies the bit patterns of bf16 matrices.
HALF = [torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]
SMALL = Tile(queries=16, keys=16, warps=4, stages=1)


@needs_triton
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 37, 48), (1, 16, 96), (1, 50, 384)])
def test_kernel_equals_reference(shape, dtype):
    batch, pixels, channels = shape
    qkv = random(batch, pixels, 3 * channels, dtype=dtype)
    expected = wide_attention_reference(qkv.float())
    with torch.no_grad(), use_backend(TRITON):
        assert why_not(qkv) is None
        got = wide_attention(qkv, SMALL)
    assert got.shape == (batch, pixels, channels) and got.dtype == dtype
    # The shares of the keys are rounded before they are multiplied, as in every flash attention.
    assert relative(got, expected) <= 2 * tolerance(dtype)


@needs_triton
def test_large_scores_do_not_overflow():
    qkv = 100 * random(1, 20, 144, dtype=torch.float16)
    with torch.no_grad(), use_backend(TRITON):
        got = wide_attention(qkv, SMALL)
    # one key takes all: what is compared is a value itself
    assert relative(got, wide_attention_reference(qkv.float())) <= 2e-3


@pytest.mark.parametrize("channels", [40, 30, 3 * 256])
def test_other_heads_take_the_reference(channels):
    qkv = random(1, 5, 3 * channels, dtype=torch.bfloat16)
    with torch.no_grad(), use_backend(TRITON):
        assert "is not three times" in why_not(qkv)
        assert torch.equal(wide_attention(qkv), wide_attention_reference(qkv))


def test_fp32_and_other_devices_take_the_reference():
    qkv = random(1, 5, 144)
    with torch.no_grad(), use_backend(TRITON):
        assert "half precision" in why_not(qkv)
    with torch.no_grad(), use_backend("reference"):
        assert "Triton is not" in why_not(qkv)
        assert torch.equal(wide_attention(qkv), wide_attention_reference(qkv))
