"""The stock autoencoder, faster on single images and with tiling that leaves no seams.

The stock VAE is a causal video model: every 3-D convolution looks at the current frame and at the two before
it. For the first frame those two are zero padding, and the layers that change the frame rate are skipped, so
a single image needs only the last temporal tap of each kernel, which is a 2-D convolution with a third of
the work. `AutoencoderKLQwenImage` runs a single image, [B, C, H, W] inside, through that tap and a video,
[B, C, T, H, W], through the stock code. Modules, parameter names and configuration are the stock ones, and
every module is called as a module, so that hooks on any of them (offloading, casting, adapters) work. Where
nothing is hooked or recorded, an NVIDIA GPU takes the shorter path of `vae_fused.py` in half precision.

A latent pixel covers `spatial_compression_ratio` (8 in the published models) image pixels on each axis.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as stock
from diffusers.models.autoencoders.vae import DecoderOutput

# diffusers' own pipelines look the base class up in the module of a component that they saved.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor, nn

from .kernels import backend

# Attributes of the stock class: height and width of a tile, then of the step between tiles, in image pixels.
TILING_ATTRIBUTES = (
    "tile_sample_min_height",
    "tile_sample_min_width",
    "tile_sample_stride_height",
    "tile_sample_stride_width",
)
_stock_init: Callable[..., None] = stock.AutoencoderKLQwenImage.__init__


class AutoencoderKLQwenImage(stock.AutoencoderKLQwenImage):
    """The stock `AutoencoderKLQwenImage` (same name, keys, configuration and calls).

    `encode` takes pixels [B, C, T, H, W] in [-1, 1], `decode` takes unnormalised latents
    [B, z_dim, T, H / 8, W / 8]; T = 1 takes the short path. Both are differentiable.

    Attributes:
        image_memory_format: layout of single images inside, `torch.channels_last` for the one that the
            tensor cores of GPUs compute in.
    """

    image_memory_format: torch.memory_format = torch.contiguous_format

    # diffusers reads the names of the configuration fields off the signature.
    @wraps(_stock_init)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            module.__class__ = IMAGE_MODULES.get(type(module), type(module))

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        *,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
    ) -> None:
        """Encode and decode in overlapping tiles, so that the tile bounds the memory and not the image.

        Neighbouring tiles are blended by linear ramps as wide as their overlap; an image that fits one tile
        is not cut. The self-attention of the VAE sees one tile only, so colours can differ a little from the
        untiled result, less with larger tiles. The sizes stay until they are changed.

        Args:
            tile_sample_min_height: height of a tile in image pixels (256 at first), as in stock diffusers.
            tile_sample_min_width: width of a tile in image pixels.
            tile_sample_stride_height: rows from one tile to the next in image pixels (192 at first).
            tile_sample_stride_width: columns from one tile to the next in image pixels.
            tile_size: size of a tile in latent pixels, one number or (height, width), instead of the four
                above, as in DiffSynth-Studio (there 128).
            tile_stride: latent pixels from one tile to the next (there 64); half of `tile_size` if not given.

        Raises:
            ValueError: if a stride is below one latent pixel or larger than its tile, or if both units are
                given.
        """
        new = (
            tile_sample_min_height,
            tile_sample_min_width,
            tile_sample_stride_height,
            tile_sample_stride_width,
        )
        if tile_size is None and tile_stride is not None:
            raise ValueError(f"Got tile_stride={tile_stride} without tile_size; give tile_size too.")
        if tile_size is not None:
            if any(value is not None for value in new):
                raise ValueError("Give tile_size (latent pixels) or tile_sample_* (image pixels), not both.")
            new = _image_pixels(tile_size, tile_stride, self.spatial_compression_ratio)
        values = [
            getattr(self, name) if value is None else value
            for name, value in zip(TILING_ATTRIBUTES, new, strict=True)
        ]
        Tiling.from_image_pixels(values, self.spatial_compression_ratio)  # raises before anything is changed
        for name, value in zip(TILING_ATTRIBUTES, values, strict=True):
            setattr(self, name, value)
        self.use_tiling = True

    def tiled_encode(self, x: Tensor) -> Tensor:
        """Encode pixels [B, C, T, H, W] in tiles; returns the moments [B, 2 z_dim, T', H // 8, W // 8]."""
        ratio = self.spatial_compression_ratio
        height, width = x.shape[-2] // ratio, x.shape[-1] // ratio

        def encode(rows: slice, columns: slice) -> Tensor:
            # The last tile takes the rest of a size that is not a multiple of the ratio, as the whole does.
            bottom = x.shape[-2] if rows.stop == height else rows.stop * ratio
            right = x.shape[-1] if columns.stop == width else columns.stop * ratio
            return self._encode_whole(x[..., rows.start * ratio : bottom, columns.start * ratio : right])

        return _blend_tiles(encode, (height, width), self._tiling(), scale=1).to(x.dtype)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents [B, z_dim, T, h, w] in tiles; the sample [B, C, T', 8 h, 8 w] is in [-1, 1]."""

        def decode(rows: slice, columns: slice) -> Tensor:
            return self._decode_whole(z[..., rows, columns])

        size = (z.shape[-2], z.shape[-1])
        blended = _blend_tiles(decode, size, self._tiling(), scale=self.spatial_compression_ratio)
        sample = blended.to(z.dtype).clamp(-1.0, 1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _encode(self, x: Tensor) -> Tensor:
        ratio = self.spatial_compression_ratio
        tiled = self.use_tiling and self._tiling().cuts(x.shape[-2] // ratio, x.shape[-1] // ratio)
        return self.tiled_encode(x) if tiled else self._encode_whole(x)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        if self.use_tiling and self._tiling().cuts(z.shape[-2], z.shape[-1]):
            return self.tiled_decode(z, return_dict=return_dict)
        sample = self._decode_whole(z).clamp(-1.0, 1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _tiling(self) -> "Tiling":
        values = [getattr(self, name) for name in TILING_ATTRIBUTES]
        return Tiling.from_image_pixels(values, self.spatial_compression_ratio)

    def _encode_image(self, x: Tensor) -> Tensor:
        if self._is_fused(self.encoder, x):
            from .vae_fused import fused_encode  # here, since it imports Triton

            return fused_encode(self, x[:, :, 0])
        moments: Tensor = self.quant_conv(self.encoder(self._image(x)))
        return moments

    def _decode_image(self, z: Tensor) -> Tensor:
        if self._is_fused(self.decoder, z):
            from .vae_fused import fused_decode

            return fused_decode(self, z[:, :, 0])
        pixels: Tensor = self.decoder(self.post_quant_conv(self._image(z)))
        return pixels

    def why_not_fused(self, x: Tensor) -> str | None:
        """Why latents `x` [B, z_dim, 1, h, w] are not decoded by the fused path; None if they are."""
        chosen = backend(x.device)
        if chosen.name == "off":
            return chosen.reason
        from .vae_fused import why_not

        return why_not(self, self.decoder, x)

    def _is_fused(self, part: nn.Module, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or backend(x.device).name == "off":
            return False
        from .vae_fused import why_not

        return why_not(self, part, x) is None

    def _image(self, x: Tensor) -> Tensor:
        """[B, C, 1, H, W] to [B, C, H, W] in the layout to compute in."""
        return x[:, :, 0].contiguous(memory_format=self.image_memory_format)

    def _encode_whole(self, x: Tensor) -> Tensor:
        """Pixels [B, C, T, H, W] to moments [B, 2 z_dim, T', H // 8, W // 8], without tiles."""
        if x.shape[2] == 1:
            return self._encode_image(x).unsqueeze(2)
        self.clear_cache()
        chunks = []  # the first frame alone, then four at a time, with the features kept from before
        for start, stop in [(0, 1), *((i, i + 4) for i in range(1, x.shape[2] - 3, 4))]:
            self._enc_conv_idx = [0]
            frames = x[:, :, start:stop]
            chunks.append(self.encoder(frames, feat_cache=self._enc_feat_map, feat_idx=self._enc_conv_idx))
        self.clear_cache()
        video: Tensor = self.quant_conv(torch.cat(chunks, dim=2))
        return video

    def _decode_whole(self, z: Tensor) -> Tensor:
        """Latents [B, z_dim, T, h, w] to pixels [B, C, T', 8 h, 8 w], without tiles and not clamped."""
        if z.shape[2] == 1:
            return self._decode_image(z).unsqueeze(2)
        self.clear_cache()
        frames = []
        for frame in self.post_quant_conv(z).split(1, dim=2):
            self._conv_idx = [0]
            frames.append(self.decoder(frame, feat_cache=self._feat_map, feat_idx=self._conv_idx))
        self.clear_cache()
        return torch.cat(frames, dim=2)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Size of a tile and step from one to the next, (height, width) in latent pixels."""

    size: tuple[int, int]
    stride: tuple[int, int]

    def __post_init__(self) -> None:
        if not all(1 <= stride <= size for size, stride in zip(self.size, self.stride, strict=True)):
            raise ValueError(
                f"Tiles of {self.size} latent pixels (height, width), {self.stride} apart, do not cover the "
                "image; the stride must be at least 1 and at most the size of a tile."
            )

    @classmethod
    def from_image_pixels(cls, values: Sequence[int], ratio: int) -> "Tiling":
        """From the four numbers of `TILING_ATTRIBUTES`, rounded down to latent pixels."""
        height, width, stride_height, stride_width = (int(value) // ratio for value in values)
        return cls(size=(height, width), stride=(stride_height, stride_width))

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image of so many latent pixels needs more than one tile."""
        return height > self.size[0] or width > self.size[1]


class CausalConv3d(stock.QwenImageCausalConv3d):
    """The stock convolution; [B, C, H, W] is one frame with nothing before it."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """[B, C, H, W] or [B, C, frames, H, W] -> the same with the output's channels and size."""
        if x.ndim == 5:
            video: Tensor = super().forward(x, cache_x)
            return video
        left, _, top, *_ = self._padding
        return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=(top, left))


class RMSNorm(stock.QwenImageRMS_norm):
    """x sqrt(C) / |x| * gamma over the channels, as stock; also for [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, C, frames, H, W], in and out."""
        if x.ndim == 5:
            video: Tensor = super().forward(x)
            return video
        normalized = F.normalize(_at_least_float32(x), dim=1).to(x.dtype)
        scaled: Tensor = normalized * self.scale * self.gamma.view(-1, 1, 1)
        return scaled


class AttentionBlock(stock.QwenImageAttentionBlock):
    """Self-attention of one head over the pixels of a frame, as stock; also for [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, C, frames, H, W], in and out."""
        if x.ndim == 5:
            video: Tensor = super().forward(x)
            return video
        qkv: Tensor = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [B, HW, 3C]
        query, key, value = (part.unsqueeze(1) for part in qkv.contiguous().chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(x.shape))
        return projected + x


class Resample(stock.QwenImageResample):
    """Half or double the size, as stock; a single frame [B, C, H, W] stays a single frame."""

    def forward(
        self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None
    ) -> Tensor:
        """[B, C, H, W] or [B, C, frames, H, W] -> half or twice H and W."""
        if x.ndim == 5:
            video: Tensor = super().forward(x, feat_cache, feat_idx)
            return video
        image: Tensor = self.resample(x)
        return image


class Upsample(stock.QwenImageUpsample):
    """Nearest-neighbour upsampling; copying values needs no detour through float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2 H, 2 W]."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")


# Stock class -> subclass that also takes one image. The other stock blocks take both as they are.
IMAGE_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    stock.QwenImageCausalConv3d: CausalConv3d,
    stock.QwenImageRMS_norm: RMSNorm,
    stock.QwenImageAttentionBlock: AttentionBlock,
    stock.QwenImageResample: Resample,
    stock.QwenImageUpsample: Upsample,
}


def _image_pixels(
    tile_size: int | tuple[int, int], tile_stride: int | tuple[int, int] | None, ratio: int
) -> tuple[int, int, int, int]:
    """The four numbers of `TILING_ATTRIBUTES` from latent pixels."""
    height, width = (tile_size, tile_size) if isinstance(tile_size, int) else tile_size
    if tile_stride is None:
        tile_stride = (max(1, height // 2), max(1, width // 2))
    rows, columns = (tile_stride, tile_stride) if isinstance(tile_stride, int) else tile_stride
    return ratio * height, ratio * width, ratio * rows, ratio * columns


def _blend_tiles(
    run: Callable[[slice, slice], Tensor], size: tuple[int, int], tiling: Tiling, *, scale: int
) -> Tensor:
    """Weighted mean of `run(rows, columns)` over the tiles of an area of `size` latent pixels, in float32.

    A latent pixel is `scale` pixels of the result, which is [..., scale * size[0], scale * size[1]].
    """
    overlap = (tiling.size[0] - tiling.stride[0], tiling.size[1] - tiling.stride[1])
    total = weight = torch.empty(0)
    for rows in _tiles(size[0], tiling.size[0], tiling.stride[0]):
        for columns in _tiles(size[1], tiling.size[1], tiling.stride[1]):
            tile = _at_least_float32(run(rows, columns))
            if total.numel() == 0:
                total = tile.new_zeros(*tile.shape[:-2], scale * size[0], scale * size[1])
                weight = tile.new_zeros(scale * size[0], scale * size[1])
            ramp_rows = _ramp(rows, size[0], overlap[0], scale)
            ramp_columns = _ramp(columns, size[1], overlap[1], scale)
            mask = torch.minimum(ramp_rows[:, None], ramp_columns[None, :]).to(tile)
            y, x = (slice(scale * part.start, scale * part.stop) for part in (rows, columns))
            total[..., y, x] += tile * mask
            weight[y, x] += mask
    return total / weight


def _tiles(length: int, size: int, stride: int) -> Iterator[slice]:
    """Ranges of `size`, `stride` apart, and one that ends at `length`: all alike, since libraries plan each
    size anew."""
    start = 0
    while start + size < length:
        yield slice(start, start + size)
        start += stride
    yield slice(max(0, length - size), length)


def _ramp(part: slice, length: int, overlap: int, scale: int) -> Tensor:
    """Weights along one axis of a tile: one, falling linearly over the overlap where a neighbour follows."""
    size, width = scale * (part.stop - part.start), scale * overlap
    position = torch.arange(1, size + 1, dtype=torch.float32)
    weights = torch.ones(size)
    if width and part.start > 0:
        weights = torch.minimum(weights, position / width)
    if width and part.stop < length:
        weights = torch.minimum(weights, position.flip(0) / width)
    return weights


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
