"""Bias, residual, RMS norm over the channels and SiLU of the autoencoder in one pass over the pixels.

    t = x + bias + residual                                  rounded to the type of x
    h = act(t * sqrt(C) / max(|t|, 1e-12) * gamma)           |t| over the channels, act: SiLU or nothing

in fp32 inside, so that only t and h are rounded. Convolutions of the vendor's library leave their bias to
another pass; here it costs nothing. The nearest-neighbour upsampling in front of a convolution is a matter of
which pixels are read, too: see `interleave` and `upsampling_weight`.

Shapes: x is [B, C, H, W] in memory as [B, H, W, C] (`torch.channels_last`); bias and gamma are [C].
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher, Variant, power_of_2

if triton_is_installed():
    import triton
    import triton.language as tl

EPSILON = 1e-12
_TILE = 4096  # values of a program's tile
_WARPS = 4


@dataclass(kw_only=True)
class Pending:
    """A sum whose terms are known but not yet added: conv + bias + residual.

    Attributes:
        conv: what a convolution gave, without its bias: [B, C, H, W], or with `is_interleaved` [B, 4 C,
            H / 2 + 1, W / 2 + 1], see `interleave`. Its memory is used for the sum.
        bias: [C], if there is one.
        residual: [B, C, H, W], if there is one.
        is_interleaved: whether `conv` holds the four phases of an upsampled picture.
    """

    conv: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    is_interleaved: bool = False

    def drop(self) -> None:
        """Let go of the terms when they were added, though callers hold on to this object."""
        self.conv, self.bias, self.residual = self.conv.new_empty(0), None, None


# 1. Reference


def add_reference(pending: Pending) -> Tensor:
    """t."""
    total = interleave_reference(pending.conv) if pending.is_interleaved else pending.conv
    total = total.float()
    if pending.bias is not None:
        total = total + pending.bias.float()[:, None, None]
    if pending.residual is not None:
        total = total + pending.residual.float()
    return total.to(pending.conv.dtype)


def norm_reference(total: Tensor, gamma: Tensor, *, silu: bool = True) -> Tensor:
    """h."""
    wide = (
        F.normalize(total.float(), dim=1, eps=EPSILON) * (gamma.float() * gamma.numel() ** 0.5)[:, None, None]
    )
    return (F.silu(wide) if silu else wide).to(total.dtype)


def interleave_reference(phases: Tensor) -> Tensor:
    """[B, 4 C, H + 1, W + 1] -> [B, C, 2 H, 2 W]: phase (p, q) of pixel (i, j) is at (i + p, j + q)."""
    batch, channels, height, width = phases.shape
    out = phases.new_empty(batch, channels // 4, 2 * height - 2, 2 * width - 2)
    for index, phase in enumerate(phases.chunk(4, dim=1)):
        p, q = divmod(index, 2)
        out[:, :, p::2, q::2] = phase[:, :, p : p + height - 1, q : q + width - 1]
    return out.contiguous(memory_format=torch.channels_last)


def upsampling_weight(weight: Tensor) -> Tensor:
    """The 3x3 kernel after nearest-neighbour doubling, as four 2x2 kernels on the small picture.

    Each pixel of the doubled picture sees 2x2 different pixels of the small one; kernel rows and columns that
    see the same one are added. Applied with a padding of 1, the result is what `interleave` puts in place:
    4/9 of the products, and the doubled picture is never written.

    Args:
        weight: [O, I, 3, 3]

    Returns:
        [4 O, I, 2, 2], phases (row, column) first; added in fp32, in the type of `weight`.
    """
    wide = weight.float()
    rows = [torch.stack([wide[:, :, 0], wide[:, :, 1] + wide[:, :, 2]], dim=2)]
    rows.append(torch.stack([wide[:, :, 0] + wide[:, :, 1], wide[:, :, 2]], dim=2))
    phases = []
    for row in rows:
        phases.append(torch.stack([row[..., 0], row[..., 1] + row[..., 2]], dim=3))
        phases.append(torch.stack([row[..., 0] + row[..., 1], row[..., 2]], dim=3))
    return torch.cat(phases).to(weight.dtype)


# 2. Triton

if triton_is_installed():
    # What a call asks for are numbers and not constants: one variant for each width and type, compiled once.
    @triton.jit(
        do_not_specialize=[
            *("num_pixels", "height", "width", "root", "eps", "has_bias", "has_residual", "is_interleaved"),
            *("keeps_total", "has_norm", "silu"),
        ]
    )
    def _kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        bias_ptr,
        residual_ptr,
        gamma_ptr,
        total_ptr,
        h_ptr,
        num_pixels,
        height,
        width,
        root,
        eps,
        has_bias,
        has_residual,
        is_interleaved,
        keeps_total,
        has_norm,
        silu,
        C: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        pixel = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        channel = tl.arange(0, BLOCK_C)
        is_channel = channel < C
        is_pixel = (pixel < num_pixels)[:, None]
        inside = is_pixel & is_channel[None, :]
        # What is not wanted has no channels ("&" of block and scalar fails in Triton 3.9's interpreter).
        is_bias = channel < C * has_bias
        is_residual = is_pixel & (channel < C * has_residual)[None, :]
        is_total = is_pixel & (channel < C * keeps_total)[None, :]
        place = pixel[:, None] * C + channel[None, :]
        start = pixel * C
        if is_interleaved != 0:
            column = pixel % width
            row = (pixel // width) % height
            picture = pixel // (width * height)
            p, q = row % 2, column % 2
            source = (picture * (height // 2 + 1) + row // 2 + p) * (width // 2 + 1) + column // 2 + q
            start = source * (4 * C) + (2 * p + q) * C
        x = tl.load(x_ptr + start[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=is_bias, other=0.0)
        residual = tl.load(residual_ptr + place, mask=is_residual, other=0.0)
        x = x + bias.to(tl.float32)[None, :] + residual.to(tl.float32)
        total = x.to(h_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=is_total)
        if has_norm != 0:
            x = total.to(tl.float32)
            length = tl.sqrt(tl.sum(x * x, 1))
            gamma = tl.load(gamma_ptr + channel, mask=is_channel, other=0.0).to(tl.float32) * root
            h = x * (1.0 / tl.maximum(length, eps))[:, None] * gamma[None, :]
            if silu != 0:
                h = h / (1.0 + tl.exp(-h))
            tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=inside)

    _run = Launcher(_kernel)


def _launch(pending: Pending, gamma: Tensor | None, *, keep: bool, silu: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel; what is not asked for comes back as the other."""
    conv = pending.conv.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = conv.shape
    residual = pending.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if pending.is_interleaved:
        channels, height, width = channels // 4, 2 * height - 2, 2 * width - 2
        total = _empty(conv, (batch, channels, height, width))
    else:
        total = conv  # a program has read its pixels when it writes them
    h = _empty(conv, total.shape) if keep and gamma is not None else total
    num_pixels = batch * height * width
    if num_pixels == 0:
        return total, h
    constants = _constants(channels)
    _run(
        (-(-num_pixels // constants[2]), 1, 1),
        (
            conv,
            conv if pending.bias is None else pending.bias,
            conv if residual is None else residual,
            conv if gamma is None else gamma,
            total,
            h,
        ),
        (
            num_pixels,
            height,
            width,
            float(channels) ** 0.5,
            EPSILON,
            int(pending.bias is not None),
            int(residual is not None),
            int(pending.is_interleaved),
            int(keep),
            int(gamma is not None),
            int(silu),
        ),
        constants,
        _WARPS,
    )
    return total, h


def _constants(channels: int) -> tuple[int, int, int]:
    """Channels, their block, and the pixels of a program."""
    block = power_of_2(channels)
    return channels, block, max(_TILE // block, 1)


def variants(widths: Iterable[int], dtype: torch.dtype) -> list[Variant]:
    """What pictures of so many channels run."""
    return [
        Variant(
            launcher=_run,
            types=(dtype,) * 6,
            numbers=(1, 1, 1, 1.0, EPSILON, 0, 0, 0, 0, 0, 0),
            constants=_constants(channels),
            num_warps=_WARPS,
        )
        for channels in widths
    ]


def _empty(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


# 3. Public, for inference: nothing here records gradients


def add(pending: Pending) -> Tensor:
    """t [B, C, H, W]; may be written over `pending.conv`."""
    if pending.bias is None and pending.residual is None and not pending.is_interleaved:
        return pending.conv
    if backend(pending.conv.device).name != "triton":
        return add_reference(pending)
    return _launch(pending, None, keep=True, silu=False)[0]


def add_norm(pending: Pending, gamma: Tensor, *, silu: bool = True) -> tuple[Tensor, Tensor]:
    """t and h, both [B, C, H, W]; t may be written over `pending.conv`."""
    if backend(pending.conv.device).name != "triton":
        total = add_reference(pending)
        return total, norm_reference(total, gamma, silu=silu)
    return _launch(pending, gamma, keep=True, silu=silu)


def norm(pending: Pending, gamma: Tensor, *, silu: bool = True) -> Tensor:
    """h [B, C, H, W] alone; may be written over `pending.conv`."""
    if backend(pending.conv.device).name != "triton":
        return norm_reference(add_reference(pending), gamma, silu=silu)
    return _launch(pending, gamma, keep=False, silu=silu)[1]
