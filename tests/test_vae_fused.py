"""The autoencoder's fused path against stock diffusers, on the CPU (Triton's interpreter) and on a GPU."""

import pytest
import torch
from accelerate import cpu_offload
from fused_cases import DEVICE, TRITON, needs_triton, relative
from test_vae import FAMILY, ROUNDING, decoded, latents, moments, pair, pixels

from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.vae_fused import why_not

BACKENDS = ["reference", pytest.param(TRITON, marks=needs_triton)]
SIZES = [(5, 6), (1, 3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("size", SIZES)
def test_against_diffusers(config, size, backend):
    stock, ours = (vae.to(DEVICE) for vae in pair(config))
    ratio = ours.spatial_compression_ratio
    x = pixels(ours, *(ratio * side for side in size), batch=2).to(DEVICE)
    z = latents(ours, *size, batch=2).to(DEVICE)
    with torch.no_grad(), use_backend(backend):
        if DEVICE == "cpu":
            assert why_not(ours, ours.encoder, x) is None and why_not(ours, ours.decoder, z) is None
        assert (moments(ours, x) - moments(stock, x)).abs().max() < ROUNDING
        assert (decoded(ours, z) - decoded(stock, z)).abs().max() < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float32_than_stock(dtype):
    # The reference: Triton's interpreter does not round as a GPU does.
    stock, ours = pair(FAMILY["published"])
    x, z = pixels(stock, 48, 64), latents(stock, 8, 6)
    with torch.no_grad(), use_backend("reference"):
        exact = moments(stock, x), decoded(stock, z)
        stock, ours = stock.to(dtype), ours.to(dtype)
        x, z = x.to(dtype), z.to(dtype)
        theirs, mine = (moments(stock, x), decoded(stock, z)), (moments(ours, x), decoded(ours, z))
    for expected, one, other in zip(exact, theirs, mine, strict=True):
        assert other.dtype == dtype
        assert relative(other, expected) <= 1.1 * relative(one, expected)


def test_what_cannot_be_fused_is_named_and_still_right():
    stock, ours = pair(FAMILY["tiny"])
    z = latents(ours, 5, 6)
    assert "not an NVIDIA GPU" in why_not(ours, ours.decoder, z)
    with use_backend("reference"):
        assert why_not(ours, ours.decoder, z) == "gradients are recorded"
        decoded(ours, z.requires_grad_()).sum().backward()
        assert z.grad is not None and bool(z.grad.any())
        with torch.no_grad():
            z = z.detach()
            assert why_not(ours, ours.decoder, z) is None
            assert "one type" in why_not(ours, ours.decoder, z.bfloat16())
            dropping = pair(FAMILY["dropout"])[1].train()
            assert why_not(dropping, dropping.decoder, z) == "dropout is active"
            cpu_offload(ours, torch.device("cpu"), offload_buffers=True)
            assert "a hook is on a" in why_not(ours, ours.decoder, z)
            assert (decoded(ours, z) - decoded(stock, z)).abs().max() < ROUNDING


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_true_width_on_a_gpu(dtype):
    """The published sizes: no further from fp32 than stock, also for sides of an odd number of latents."""
    with torch.device("cuda"):
        stock, ours = pair({})
    x, z = pixels(stock, 168, 200).cuda(), latents(stock, 21, 25).cuda()
    with torch.no_grad():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = moments(stock, x), decoded(stock, z)
        stock, ours, x, z = stock.to(dtype), ours.to(dtype), x.to(dtype), z.to(dtype)
        assert why_not(ours, ours.decoder, z) is None
        theirs, mine = (moments(stock, x), decoded(stock, z)), (moments(ours, x), decoded(ours, z))
    for expected, one, other in zip(exact, theirs, mine, strict=True):
        assert relative(other, expected) <= 1.1 * relative(one, expected)
