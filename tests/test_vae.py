"""The autoencoder against stock diffusers, and its tiling."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from diffusers_qwenimage.vae import AutoencoderKLQwenImage

Stock = diffusers.AutoencoderKLQwenImage
TINY = {
    "base_dim": 24,
    "z_dim": 4,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
FAMILY = {
    "tiny": TINY,
    # The published shape, with fewer channels: z_dim 16, four levels, two residual blocks, factor 8.
    "published": {"base_dim": 12},
    "layered": {"base_dim": 12, "input_channels": 4},
    "levels": TINY | {"dim_mult": [1, 1, 2, 2], "temperal_downsample": [True, False, True]},
    "one level": TINY | {"dim_mult": [2], "temperal_downsample": [], "num_res_blocks": 2},
    "dropout": TINY | {"dropout": 0.5},
}
# Float32 sums in another order: a few units in the last place of values of order one.
ROUNDING = 5e-6


def pair(config: dict[str, object]) -> tuple[torch.nn.Module, AutoencoderKLQwenImage]:
    """Stock and ours with the same random weights; gains and biases too, which start as ones and zeros."""
    torch.manual_seed(0)
    stock = Stock(**config).eval()
    for name, parameter in stock.named_parameters():
        if name.endswith(("gamma", "bias")):
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("gamma") else 0.0, std=0.2)
    ours = AutoencoderKLQwenImage(**config).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def pixels(vae: torch.nn.Module, *shape: int, batch: int = 1, frames: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (batch, vae.config.input_channels, frames, *shape)
    return torch.rand(size, generator=generator) * 2 - 1


def latents(vae: torch.nn.Module, *shape: int, batch: int = 1, frames: int = 1) -> Tensor:
    size = (batch, vae.config.z_dim, frames, *shape)
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def moments(vae: torch.nn.Module, x: Tensor) -> Tensor:
    parameters: Tensor = vae.encode(x).latent_dist.parameters
    return parameters


def decoded(vae: torch.nn.Module, z: Tensor) -> Tensor:
    sample: Tensor = vae.decode(z).sample
    return sample


# Against stock.


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_against_diffusers_single_images(config: dict[str, object], size: tuple[int, int]) -> None:
    stock, ours = pair(config)
    x, z = pixels(stock, *size, batch=2), latents(stock, 8, 6, batch=2)
    with torch.no_grad():
        expected, found = moments(stock, x), moments(ours, x)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < ROUNDING * max(1.0, float(expected.abs().max()))
        expected, found = decoded(stock, z), decoded(ours, z)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < ROUNDING
        assert 0.1 < found.abs().mean() and found.abs().max() <= 1


def gradients(
    vae: torch.nn.Module, run: Callable[[torch.nn.Module, Tensor], Tensor], x: Tensor
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    vae.zero_grad()
    result = run(vae, x)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=result.dtype)
    (result * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in vae.named_parameters()}
    return [x.grad, *(torch.zeros(()) if grad is None else grad for grad in found.values())]


@pytest.mark.parametrize("config", [FAMILY["tiny"], FAMILY["layered"]], ids=["tiny", "layered"])
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_against_diffusers_gradients(config: dict[str, object], part: str) -> None:
    stock, ours = (vae.double() for vae in pair(config))
    run, x = (moments, pixels(stock, 32, 48)) if part == "encode" else (decoded, latents(stock, 8, 6))
    expected, found = gradients(stock, run, x.double()), gradients(ours, run, x.double())
    assert sum(bool(gradient.any()) for gradient in expected) > 20
    for one, other in zip(expected, found, strict=True):
        # Stock upsamples in float32 even here, which is the whole difference of the decoder (1e-7 relative to
        # the terms that are summed). The encoder agrees to rounding in double precision.
        tolerance = (1e-9 if part == "encode" else 1e-5) * max(1.0, float(one.abs().max()))
        assert (other - one).abs().max() < tolerance


def test_against_diffusers_dropout_uses_the_same_random_numbers() -> None:
    stock, ours = (vae.train() for vae in pair(FAMILY["dropout"]))
    z = latents(stock, 8, 6)
    torch.manual_seed(4)
    expected = decoded(stock, z)
    torch.manual_seed(4)
    assert (decoded(ours, z) - expected).abs().max() < ROUNDING


def test_attention_between_the_levels_runs_in_the_encoder() -> None:
    # Stock raises TypeError here: it hands its feature cache to attention blocks, which take none. Without
    # the cache its encoder runs, and is the oracle.
    stock, ours = pair(TINY | {"attn_scales": [1.0, 0.5]})
    x = pixels(stock, 32, 48)
    with torch.no_grad(), pytest.raises(TypeError):
        moments(stock, x)
    with torch.no_grad():
        expected = stock.quant_conv(stock.encoder(x))
        assert (moments(ours, x) - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("frames", [2, 5, 8, 9])
def test_against_diffusers_video_is_bit_equal(frames: int) -> None:
    stock, ours = pair(FAMILY["levels"])
    x, z = pixels(stock, 32, 24, frames=frames), latents(stock, 4, 3, frames=frames)
    with torch.no_grad():
        assert torch.equal(moments(ours, x), moments(stock, x))
        assert torch.equal(decoded(ours, z), decoded(stock, z))
        # No state is left behind.
        assert torch.equal(decoded(ours, z), decoded(stock, z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float32_than_stock(dtype: torch.dtype) -> None:
    stock, ours = pair(FAMILY["tiny"])
    x, z = pixels(stock, 32, 48), latents(stock, 8, 6)
    with torch.no_grad():
        exact = [moments(stock, x), decoded(stock, z)]
        stock, ours = stock.to(dtype), ours.to(dtype)
        x, z = x.to(dtype), z.to(dtype)
        for expected, one, other in zip(
            exact, [moments(stock, x), decoded(stock, z)], [moments(ours, x), decoded(ours, z)], strict=True
        ):
            assert other.dtype == dtype
            # The rounding errors differ and are of the same size; a quarter more covers the chance in them.
            assert (other - expected).square().mean() <= 1.25**2 * (one - expected).square().mean()


def test_slicing_and_tuples_and_forward() -> None:
    stock, ours = pair(FAMILY["tiny"])
    x, z = pixels(stock, 32, 48, batch=3), latents(stock, 8, 6, batch=3)
    with torch.no_grad():
        whole = moments(ours, x), decoded(ours, z)
        assert (ours(x).sample - stock(x).sample).abs().max() < ROUNDING
        ours.enable_slicing()
        assert (moments(ours, x) - whole[0]).abs().max() < ROUNDING
        assert (decoded(ours, z) - whole[1]).abs().max() < ROUNDING
        assert torch.equal(ours.decode(z, return_dict=False)[0], decoded(ours, z))
        assert torch.equal(ours.encode(x, return_dict=False)[0].mode(), ours.encode(x).latent_dist.mode())


# Files, devices, hooks, compilers.


def test_saves_and_loads_both_ways_with_stock(tmp_path: Path) -> None:
    stock, ours = pair(FAMILY["layered"])
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert json.loads((tmp_path / "ours/config.json").read_text())["_class_name"] == "AutoencoderKLQwenImage"
    for loader, folder in (
        (Stock, "ours"),
        (AutoencoderKLQwenImage, "stock"),
        (AutoencoderKLQwenImage, "ours"),
    ):
        loaded = loader.from_pretrained(tmp_path / folder)
        assert type(loaded) is loader
        state = loaded.state_dict()
        assert state.keys() == stock.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in stock.state_dict().items())
        assert loaded.config.input_channels == 4


def test_config_matches_stock() -> None:
    assert dict(AutoencoderKLQwenImage(base_dim=12).config) == dict(Stock(base_dim=12).config)
    from_config = AutoencoderKLQwenImage.from_config(Stock(**TINY).config)
    assert from_config.config.z_dim == 4


def test_loads_low_precision(tmp_path: Path) -> None:
    _, ours = pair(FAMILY["tiny"])
    ours.save_pretrained(tmp_path)
    loaded = AutoencoderKLQwenImage.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.isfinite(decoded(loaded, latents(loaded, 8, 6).bfloat16())).all()


def test_meta_device() -> None:
    stock, ours = pair(FAMILY["tiny"])
    with torch.device("meta"):
        empty = AutoencoderKLQwenImage(**TINY)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.load_state_dict(stock.state_dict(), assign=True)
    z = latents(stock, 8, 6)
    assert torch.equal(decoded(empty.eval(), z), decoded(ours, z))


def test_copies_keep_the_short_path() -> None:
    _, ours = pair(FAMILY["tiny"])
    copied = copy.deepcopy(ours)
    z = latents(ours, 8, 6)
    assert torch.equal(decoded(copied, z), decoded(ours, z))


def offload_leaves(vae: AutoencoderKLQwenImage) -> None:
    cpu_offload(vae, torch.device("cpu"), offload_buffers=True)


def offload_groups(vae: AutoencoderKLQwenImage) -> None:
    apply_group_offloading(
        vae, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("offload", [offload_leaves, offload_groups])
def test_hooks_on_every_module(offload: Callable[[AutoencoderKLQwenImage], None]) -> None:
    _, ours = pair(FAMILY["tiny"])
    x, z = pixels(ours, 32, 48), latents(ours, 8, 6)
    with torch.no_grad():
        expected = moments(ours, x), decoded(ours, z)
        offload(ours)
        assert torch.equal(moments(ours, x), expected[0])
        assert torch.equal(decoded(ours, z), expected[1])


def test_layerwise_casting_stores_in_eight_bits_and_computes_in_float32() -> None:
    stock, ours = pair(FAMILY["tiny"])
    z = latents(ours, 8, 6)
    with torch.no_grad():
        for vae in (stock, ours):
            vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert ours.decoder.conv_in.weight.dtype == torch.float8_e4m3fn
        assert (decoded(ours, z) - decoded(stock, z)).abs().max() < ROUNDING


def test_channels_last_computes_the_same() -> None:
    stock, ours = pair(FAMILY["tiny"])
    ours.image_memory_format = torch.channels_last
    x, z = pixels(stock, 32, 48), latents(stock, 8, 6)
    with torch.no_grad():
        assert (moments(ours, x) - moments(stock, x)).abs().max() < ROUNDING
        assert (decoded(ours, z) - decoded(stock, z)).abs().max() < ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, layout: torch.memory_format) -> None:
    stock, ours = pair(FAMILY["published"])
    x, z = pixels(stock, 128, 192), latents(stock, 16, 24)
    with torch.no_grad():
        exact = [moments(stock, x), decoded(stock, z)]
        stock, ours = stock.to("cuda", dtype), ours.to("cuda", dtype)
        ours.image_memory_format = layout
        x, z = x.to("cuda", dtype), z.to("cuda", dtype)
        theirs, mine = [moments(stock, x), decoded(stock, z)], [moments(ours, x), decoded(ours, z)]
    for expected, one, other in zip(exact, theirs, mine, strict=True):
        # As on the CPU: rounding errors of the same size.
        assert (other.cpu() - expected).square().mean() <= 1.25**2 * (one.cpu() - expected).square().mean()


def test_compiles_as_one_graph() -> None:
    _, ours = pair(FAMILY["tiny"])
    x, z = pixels(ours, 32, 48), latents(ours, 8, 6)
    encode = torch.compile(lambda x: moments(ours, x), backend="aot_eager", fullgraph=True)
    decode = torch.compile(lambda z: decoded(ours, z), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert (encode(x) - moments(ours, x)).abs().max() < ROUNDING
        assert (decode(z) - decoded(ours, z)).abs().max() < ROUNDING
