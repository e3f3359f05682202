import pytest
import torch
from components import generator, random, vaes
from diffusers import QwenImagePipeline
from diffusers.utils.torch_utils import randn_tensor

from diffusers_qwenimage import latents


def test_packing_equals_diffusers_and_is_undone():
    raw = random(2, 4, 6, 8)
    packed = latents.pack(raw)
    assert torch.equal(packed, QwenImagePipeline._pack_latents(raw, 2, 4, 6, 8))
    assert torch.equal(latents.unpack(packed, 3, 4)[:, :, 0], raw)
    assert torch.equal(latents.unpack(packed, 3, 4), QwenImagePipeline._unpack_latents(packed, 48, 64, 8))


@pytest.mark.parametrize("height, width, grid", [(1328, 1328, (83, 83)), (40, 47, (2, 2)), (16, 31, (1, 1))])
def test_token_grid(height, width, grid):
    assert latents.token_grid(8, height, width) == grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_equals_diffusers(dtype):
    arguments = {"device": torch.device("cpu"), "dtype": dtype}
    ours = latents.initial_noise(2, 4, 3, 5, generator=generator(), **arguments)
    stock = randn_tensor((2, 1, 4, 6, 10), generator=generator(), **arguments)
    assert torch.equal(ours, QwenImagePipeline._pack_latents(stock, 2, 4, 6, 10))


def test_each_picture_its_generator():
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32}
    both = latents.initial_noise(2, 4, 3, 5, generator=[generator(1), generator(2)], **arguments)
    second = latents.initial_noise(1, 4, 3, 5, generator=generator(2), **arguments)
    assert torch.equal(both[1:], second)
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        latents.initial_noise(2, 4, 3, 5, generator=[generator(1)], **arguments)


def test_encode_mode_and_sample_differ_and_decode_undoes_the_statistics():
    vae, stock = vaes()
    pixels = random(2, 3, 32, 24).clamp(-1, 1)
    with torch.no_grad():
        mode = latents.encode(vae, pixels, sample=False)
        sample = latents.encode(vae, pixels, generator=generator())
        again = latents.encode(vae, pixels, generator=generator())
        raw = stock.encode(pixels[:, :, None]).latent_dist.mode()
        decoded = latents.decode(vae, mode, 4, 3)
        expected = stock.decode(raw).sample[:, :, 0]
    assert mode.shape == (2, 12, 16)
    assert torch.equal(sample, again) and not torch.equal(sample, mode)
    # normalising and back: two fp32 roundings
    assert (decoded - expected).abs().max() < 1e-5


def test_encode_with_a_generator_for_each_picture():
    vae, _ = vaes()
    pixels = random(2, 3, 32, 24).clamp(-1, 1)
    with torch.no_grad():
        both = latents.encode(vae, pixels, generator=[generator(1), generator(2)])
        second = latents.encode(vae, pixels[1:], generator=generator(2))
    assert (both[1:] - second).abs().max() < 1e-6  # a batch of one and of two: other kernels
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        latents.encode(vae, pixels, generator=[generator()])
