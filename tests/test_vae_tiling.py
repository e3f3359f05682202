"""Tiling of the autoencoder: nearly what it gives in one piece, without seams."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_vae import FAMILY, decoded, latents, moments, pair, pixels
from torch import Tensor

from diffusers_qwenimage.vae import AutoencoderKLQwenImage, Tiling, _blend_tiles, _tiles


def without_attention(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """The rest of the network is local, so that tiles with enough overlap can be exact."""
    for name, parameter in vae.named_parameters():
        if ".proj." in name:
            torch.nn.init.zeros_(parameter)
    return vae


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    scale=st.sampled_from([1, 2, 8]),
)
def test_blending_exact_tiles_gives_the_whole(
    height: int, width: int, size: tuple[int, int], shares: tuple[float, float], scale: int
) -> None:
    stride = tuple(max(1, round(share * side)) for share, side in zip(shares, size, strict=True))
    whole = torch.rand(2, 3, 1, scale * height, scale * width)

    def run(rows: slice, columns: slice) -> Tensor:
        assert rows.stop - rows.start <= size[0] and columns.stop - columns.start <= size[1]
        return whole[
            ..., scale * rows.start : scale * rows.stop, scale * columns.start : scale * columns.stop
        ]

    blended = _blend_tiles(
        run, (height, width), Tiling(size=size, stride=(stride[0], stride[1])), scale=scale
    )
    assert blended.shape == whole.shape
    # Each of the tiles over a pixel rounds the weighted sum and the sum of the weights by 2^-24.
    tiles = math.prod(-(-side // step) for side, step in zip(size, stride, strict=True))
    assert (blended - whole).abs().max() <= (2 * tiles + 2) * 2**-24


@pytest.mark.parametrize(
    ("height", "width", "frames"), [(20, 20, 1), (21, 35, 1), (34, 10, 1), (7, 40, 1), (20, 25, 2)]
)
def test_tiled_is_near_untiled(height: int, width: int, frames: int) -> None:
    vae = without_attention(pair(FAMILY["tiny"])[1])
    z = latents(vae, height, width, frames=frames)
    ratio = vae.spatial_compression_ratio
    x = pixels(vae, ratio * height + 3, ratio * width + 1, frames=4 * frames - 3)
    with torch.no_grad():
        whole = moments(vae, x), decoded(vae, z)
        vae.enable_tiling(tile_size=16, tile_stride=8)
        tiled = moments(vae, x), decoded(vae, z)
    for one, other in zip(whole, tiled, strict=True):
        assert other.shape == one.shape
        # Beside its own border a tile sees zeros instead of pixels; there the ramps give it little weight.
        assert (other - one).abs().max() < 0.5 * one.std()
        assert (other - one).abs().mean() < 0.05 * one.std()


def jumps(image: Tensor) -> Tensor:
    """Largest difference between neighbours, for each pair of rows and each pair of columns."""
    rows = image.diff(dim=-2).abs().amax(dim=(0, 1, 2, 4))
    columns = image.diff(dim=-1).abs().amax(dim=(0, 1, 2, 3))
    return torch.cat([rows, columns])


def test_smooth_input_stays_smooth_across_tiles() -> None:
    _, vae = pair(FAMILY["published"])
    position = torch.linspace(-1, 1, 40)
    z = (position[:, None] * position[None, :]).expand(1, 16, 1, 40, 40) * torch.linspace(-2, 2, 16).view(
        1, 16, 1, 1, 1
    )
    with torch.no_grad():
        whole = decoded(vae, z)
        vae.enable_tiling(tile_size=16, tile_stride=8)
        tiled = decoded(vae, z)
    # With attention in place; no edge is sharper than the sharpest of the untiled picture.
    assert jumps(tiled).max() < 1.05 * jumps(whole).max()


def test_stock_sizes_and_defaults() -> None:
    _, vae = pair(FAMILY["published"])
    vae.enable_tiling()
    assert vae._tiling() == Tiling(size=(32, 32), stride=(24, 24))
    vae.enable_tiling(tile_sample_min_height=512, tile_sample_stride_width=100)
    assert vae._tiling() == Tiling(size=(64, 32), stride=(24, 12))
    vae.enable_tiling(tile_size=128, tile_stride=64)
    assert vae.tile_sample_min_width == 1024
    vae.enable_tiling(tile_size=(30, 20))
    assert vae._tiling() == Tiling(size=(30, 20), stride=(15, 10))
    vae.disable_tiling()
    assert not vae.use_tiling


def test_an_image_of_one_tile_is_not_changed() -> None:
    _, vae = pair(FAMILY["tiny"])
    z = latents(vae, 16, 12)
    expected = decoded(vae, z)
    vae.enable_tiling(tile_size=16, tile_stride=8)
    assert torch.equal(decoded(vae, z), expected)


def test_tiles_are_alike() -> None:
    """Libraries plan each size anew, so that a smaller tile at the border would cost more than it saves."""
    for length, size, stride in ((166, 96, 72), (128, 112, 84), (50, 16, 8), (10, 16, 8)):
        tiles = list(_tiles(length, size, stride))
        assert {part.stop - part.start for part in tiles} == {min(size, length)}
        assert tiles[0].start == 0 and tiles[-1].stop == length
        assert all(after.start <= before.stop for before, after in itertools.pairwise(tiles))


def test_tiles_are_clamped_after_blending() -> None:
    _, vae = pair(FAMILY["tiny"])
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 50.0)
    vae.enable_tiling(tile_size=8, tile_stride=4)
    assert decoded(vae, latents(vae, 12, 12)).unique().tolist() == [1.0]


def test_tiling_without_overlap_and_in_half_precision() -> None:
    vae = pair(FAMILY["tiny"])[1].bfloat16()
    vae.enable_tiling(tile_size=8, tile_stride=8)
    sample = decoded(vae, latents(vae, 13, 17).bfloat16())
    assert sample.dtype == torch.bfloat16
    assert torch.isfinite(sample).all()


def test_tiling_is_differentiable() -> None:
    _, vae = pair(FAMILY["tiny"])
    vae.enable_tiling(tile_size=8, tile_stride=4)
    z = latents(vae, 12, 12).requires_grad_()
    decoded(vae, z).sum().backward()
    assert z.grad is not None and bool((z.grad != 0).all())


@pytest.mark.parametrize(
    "arguments",
    [
        {"tile_size": 8, "tile_stride": 9},
        {"tile_size": (8, 4), "tile_stride": 5},
        {"tile_size": 8, "tile_stride": 0},
        {"tile_size": 0},
        {"tile_sample_min_height": 64},
        {"tile_sample_stride_width": 3},
    ],
)
def test_tiles_that_do_not_cover_are_refused(arguments: dict[str, int]) -> None:
    _, vae = pair(FAMILY["tiny"])
    with pytest.raises(ValueError, match="do not cover the image; the stride must be"):
        vae.enable_tiling(**arguments)
    assert not vae.use_tiling
    assert vae.tile_sample_min_height == 256


def test_mixed_units_are_refused() -> None:
    _, vae = pair(FAMILY["tiny"])
    with pytest.raises(ValueError, match="not both"):
        vae.enable_tiling(tile_size=8, tile_sample_min_height=64)
    with pytest.raises(ValueError, match="without tile_size"):
        vae.enable_tiling(tile_stride=8)
