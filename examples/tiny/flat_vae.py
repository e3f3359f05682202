"""The VAE as a network on single pictures: what is trained, and its way to and from the stock class."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageRMS_norm,
)
from torch import Tensor, nn

LATENT_CHANNELS = 16
LATENT_NOISE = 0.1  # standard deviation the decoder is trained to tolerate, and the posterior's


def make_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )


class FlatVae(nn.Module):
    """The VAE on single pictures: every 3-D convolution is the 2-D one of its last temporal tap.

    Exact, since the causal padding in front of a single frame is zero. `fold` puts the weights back.
    """

    def __init__(self) -> None:
        super().__init__()
        vae = make_vae()
        flatten(vae)
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] to mean latents (N, 16, H/8, W/8)."""
        mean: Tensor = self.quant_conv(self.encoder(pictures))[:, :LATENT_CHANNELS]
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(self.post_quant_conv(latents))
        return pictures

    @torch.no_grad()
    def unfold(self, vae: AutoencoderKLQwenImage) -> None:
        """Takes the weights of a stock VAE: the last temporal tap of every kernel."""
        stock = vae.state_dict()
        flat = {}
        for name, value in self.state_dict().items():
            folded = stock[name][:, :, -1] if stock[name].ndim == 5 else stock[name]
            flat[name] = folded.float().reshape(value.shape)
        self.load_state_dict(flat)

    @torch.no_grad()
    def fold(self, mean: list[float], std: list[float]) -> AutoencoderKLQwenImage:
        """The stock VAE with these weights: last taps filled, others zero, time convolutions identities."""
        vae = make_vae(mean, std)
        flat = {name: value.detach().float().cpu() for name, value in self.state_dict().items()}
        folded: dict[str, Tensor] = {}
        for name, value in vae.state_dict().items():
            if ".time_conv." in name:
                folded[name] = identity_over_time(value)
            elif value.ndim == 5:
                folded[name] = torch.zeros_like(value)
                folded[name][:, :, -1] = flat[name]
            else:
                folded[name] = flat[name].reshape(value.shape)
        # The log variance is the constant that training used.
        folded["quant_conv.weight"][LATENT_CHANNELS:] = 0
        folded["quant_conv.bias"][LATENT_CHANNELS:] = 2 * torch.tensor(LATENT_NOISE).log()
        vae.load_state_dict(folded)
        return vae


def flatten(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            kernel, pad = child.kernel_size[-1], child._padding[0]
            setattr(module, name, nn.Conv2d(child.in_channels, child.out_channels, kernel, padding=pad))
        elif isinstance(child, QwenImageRMS_norm):
            setattr(module, name, FlatNorm(child))
        elif isinstance(child, QwenImageResample):
            setattr(module, name, FlatResample(child))
        elif isinstance(child, QwenImageAttentionBlock):
            flatten(child)
            setattr(module, name, FlatAttention(child))
        else:
            flatten(child)


class FlatResample(nn.Module):
    def __init__(self, stock: QwenImageResample) -> None:
        super().__init__()
        self.resample = stock.resample
        if stock.mode.startswith("upsample"):
            self.resample[0] = nn.Upsample(scale_factor=2.0, mode="nearest-exact")

    def forward(self, x: Tensor) -> Tensor:
        resampled: Tensor = self.resample(x)
        return resampled


class FlatNorm(nn.Module):
    """The stock norm over channels as one kernel on channels-last memory."""

    def __init__(self, stock: QwenImageRMS_norm) -> None:
        super().__init__()
        self.gamma = nn.Parameter(stock.gamma.detach().reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            gamma = self.gamma.flatten().to(x.dtype)
            normed = F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), gamma, eps=1e-12)
        return normed.permute(0, 3, 1, 2)


class FlatAttention(nn.Module):
    """Does nothing: its output projection is zero and stays so.

    The VAE then sees only neighbourhoods, so it may be trained on crops and used at any size.
    """

    def __init__(self, stock: QwenImageAttentionBlock) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = stock.norm, stock.to_qkv, stock.proj
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x


def identity_over_time(value: Tensor) -> Tensor:
    """A time convolution (out, in, 3, 1, 1) that repeats the last frame, out a multiple of in; or a bias."""
    result = torch.zeros_like(value)
    if value.ndim == 5:
        result[:, :, -1, 0, 0] = torch.eye(value.shape[1]).repeat(value.shape[0] // value.shape[1], 1)
    return result


def pack(latents: Tensor) -> Tensor:
    """(N, 16, 2h, 2w) to (N, h*w, 64), as the pipelines pack."""
    number, channels, height, width = latents.shape
    tiles = latents.reshape(number, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(number, height * width // 4, channels * 4)
