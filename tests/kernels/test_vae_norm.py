import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from fused_cases import DEVICE, DTYPES, TRITON, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import use_backend, vae_norm
from diffusers_qwenimage.kernels.vae_norm import Pending

SHAPES = [(1, 96, 3, 5), (2, 12, 4, 3), (1, 384, 2, 2), (1, 7, 1, 1), (3, 1, 2, 5), (1, 192, 9, 7)]


def picture(*shape, dtype=torch.float32, seed=0):
    return random(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def pending(shape, dtype, *, bias=True, residual=True, is_interleaved=False):
    batch, channels, height, width = shape
    conv = picture(*shape, dtype=dtype)
    if is_interleaved:
        conv = picture(batch, 4 * channels, height + 1, width + 1, dtype=dtype)
        height, width = 2 * height, 2 * width
    return Pending(
        conv=conv,
        bias=random(channels, dtype=dtype, seed=1) if bias else None,
        residual=picture(batch, channels, height, width, dtype=dtype, seed=2) if residual else None,
        is_interleaved=is_interleaved,
    )


def copied(given):
    return Pending(**{**vars(given), "conv": given.conv.clone()})


def stock(given, gamma):
    """diffusers' operations, one after the other."""
    total = given.conv + given.bias[:, None, None] + given.residual
    module = QwenImageRMS_norm(gamma.numel()).to(total.device, total.dtype)
    module.gamma.data = gamma[:, None, None]
    return total, F.silu(module(total))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_diffusers_no_less_exact(shape, dtype):
    given, gamma = pending(shape, dtype), random(shape[1], dtype=dtype, seed=3)
    wide = Pending(conv=given.conv.double(), bias=given.bias.double(), residual=given.residual.double())
    with torch.no_grad():
        exact, theirs = stock(wide, gamma.double()), stock(given, gamma)
    total = vae_norm.add_reference(given)
    for ours, plain, truth in zip((total, vae_norm.norm_reference(total, gamma)), theirs, exact, strict=True):
        assert ours.dtype == dtype
        # one rounding instead of up to five; 1e-6 where fp32 itself is the limit
        assert relative(ours, truth) <= 1.05 * relative(plain, truth) + 1e-6


@needs_triton
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference(shape, dtype, is_interleaved):
    given = pending(shape, dtype, is_interleaved=is_interleaved)
    gamma = random(shape[1], dtype=dtype, seed=3)
    total = vae_norm.add_reference(given)
    h = vae_norm.norm_reference(total, gamma)
    with torch.no_grad(), use_backend(TRITON):
        got = (
            vae_norm.add(copied(given)),
            *vae_norm.add_norm(copied(given), gamma),
            vae_norm.norm(copied(given), gamma),
        )
    for one, other in zip(got, (total, total, h, h), strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert relative(one, other) <= tolerance(dtype)


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_what_is_not_given_is_not_added(bias, residual, silu):
    given = pending((2, 12, 3, 5), torch.float32, bias=bias, residual=residual)
    gamma = random(12, seed=3)
    expected = vae_norm.add_reference(given)
    with torch.no_grad(), use_backend(TRITON):
        total, h = vae_norm.add_norm(copied(given), gamma, silu=silu)
        assert relative(vae_norm.add(copied(given)), expected) <= 1e-6
    assert relative(total, expected) <= 1e-6
    assert relative(h, vae_norm.norm_reference(expected, gamma, silu=silu)) <= 1e-6


@needs_triton
def test_other_layouts_and_empty_pictures():
    conv, gamma = random(2, 12, 3, 5), random(12, seed=3)
    given = Pending(conv=conv, residual=random(2, 12, 3, 5, seed=1))
    expected = vae_norm.norm_reference(vae_norm.add_reference(given), gamma)
    with torch.no_grad(), use_backend(TRITON):
        assert relative(vae_norm.norm(given, gamma), expected) <= 1e-6
        empty = Pending(conv=torch.empty(0, 12, 3, 5, device=DEVICE))
        assert vae_norm.norm(empty, gamma).shape == (0, 12, 3, 5)


def test_a_pixel_of_zeros_stays_zero():
    given = Pending(conv=torch.zeros(1, 8, 1, 1, device=DEVICE))
    assert not vae_norm.norm_reference(vae_norm.add_reference(given), random(8)).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 2)])
def test_against_upsampling_and_then_convolving(size):
    x, weight = random(2, 6, *size).double(), random(5, 6, 3, 3, seed=1).double()
    big = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    expected = F.conv2d(big, weight, padding=1)
    phases = F.conv2d(x, vae_norm.upsampling_weight(weight).double(), padding=1)
    assert phases.shape == (2, 20, size[0] + 1, size[1] + 1)
    # kernel values are added in fp32
    assert relative(vae_norm.interleave_reference(phases), expected) <= 1e-6
