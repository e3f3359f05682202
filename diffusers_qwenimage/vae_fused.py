"""Encoder and decoder of the autoencoder on one image, from the fused operations of `kernels`, for inference.

What is computed is what `vae.py` computes; the order is chosen for the GPU:

* pictures lie in memory pixel by pixel (`torch.channels_last`), where the tensor cores want them;
* a residual block hands on its sum unadded (`Pending`): the next block's norm adds it, with the biases of the
  convolutions, in the pass that it makes over the pixels anyway;
* 1x1 convolutions are matrix products;
* nearest-neighbour upsampling and the convolution behind it are one convolution of the small picture;
* the few channels of pixels and latents are filled up to eight, below which tensor cores do not work;
* what is no longer needed is freed or written over, so that three pictures of the largest size exist at a
  time.

Gradients, compilation, hooks and changed modules take the plain path (`why_not`).

Shapes: B images, C channels, H and W rows and columns of pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as stock
from torch import Tensor, nn

from .kernels import backend
from .kernels.vae_attention import wide_attention
from .kernels.vae_norm import Pending, add, add_norm, norm, upsampling_weight
from .module_hooks import is_hooked, is_idle_dropout
from .vae import IMAGE_MODULES

_ALIGNMENT = 8  # channels; 16 bytes in half precision


def why_not(vae: Any, part: nn.Module, x: Tensor) -> str | None:
    """Why the fused path cannot run `part` (encoder or decoder) on `x`; None if it can."""
    if torch.compiler.is_compiling():
        return "the model is compiled"
    chosen = backend(x.device)
    if chosen.name == "off":
        return chosen.reason
    if x.dtype == torch.float32 and chosen.name == "triton" and x.device.type == "cuda":
        return "in fp32 the vendor's convolutions are as quick in the plain layout"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    around = (vae.quant_conv, vae.post_quant_conv)
    tensors = [x, *(p for module in (part, *around) for p in module.parameters())]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are recorded"
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != x.dtype for t in tensors):
        return "weights and pixels are not plain tensors of one type"
    if type(part.nonlinearity) is not nn.SiLU:
        return f"the activation is {type(part.nonlinearity).__name__}, not SiLU"
    for module in (*around, *part.modules()):
        if is_hooked(module):
            return f"a hook is on a {type(module).__name__}"
        if isinstance(module, nn.Dropout) and not is_idle_dropout(module):
            return "dropout is active"
        if type(module) not in _KNOWN:
            return f"it has a {type(module).__name__}"
    return None


def fused_encode(vae: Any, pixels: Tensor) -> Tensor:
    """Moments [B, 2 z_dim, h, w] of images [B, C, H, W]."""
    encoder = vae.encoder
    x = _first(encoder.conv_in, pixels)
    for layer in encoder.down_blocks:
        x = _layer(layer, x)
    x = _middle(encoder.mid_block, x)
    h = norm(x, _gamma(encoder.norm_out))
    x.drop()
    return _pointwise(vae.quant_conv, _last(encoder.conv_out, h))


def fused_decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, C, H, W], not clamped, of latents [B, z_dim, h, w]."""
    decoder = vae.decoder
    latents = latents.contiguous(memory_format=torch.channels_last)
    x = _first(decoder.conv_in, _pointwise(vae.post_quant_conv, latents))
    x = _middle(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for layer in (*block.resnets, *(block.upsamplers or ())):
            x = _layer(layer, x)
    h = norm(x, _gamma(decoder.norm_out))
    x.drop()
    return _last(decoder.conv_out, h)


def _middle(block: Any, x: Pending) -> Pending:
    x = _layer(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _layer(resnet, x if attention is None else _layer(attention, x))
    return x


def _layer(layer: Any, x: Pending) -> Pending:
    if isinstance(layer, stock.QwenImageResidualBlock):
        return _residual_block(layer, x)
    if isinstance(layer, stock.QwenImageAttentionBlock):
        return _attention(layer, x)
    if layer.mode.startswith("upsample"):
        return _upsample(layer.resample[1], x)
    return _downsample(layer.resample[1], x)


def _residual_block(block: Any, x: Pending) -> Pending:
    total, h = add_norm(x, _gamma(block.norm1))
    x.drop()
    h = _convolve(block.conv1, h)
    h = norm(Pending(conv=h, bias=block.conv1.bias), _gamma(block.norm2))
    h = _convolve(block.conv2, h)
    if isinstance(block.conv_shortcut, nn.Identity):
        return Pending(conv=h, bias=block.conv2.bias, residual=total)
    return Pending(conv=h, bias=block.conv2.bias, residual=_pointwise(block.conv_shortcut, total))


def _attention(block: Any, x: Pending) -> Pending:
    total, h = add_norm(x, _gamma(block.norm), silu=False)
    x.drop()
    batch, channels, height, width = total.shape
    qkv = _pointwise(block.to_qkv, h).permute(0, 2, 3, 1).reshape(batch, height * width, 3 * channels)
    attended = wide_attention(qkv).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return Pending(conv=_pointwise(block.proj, attended), residual=total)


def _upsample(convolution: Any, x: Pending) -> Pending:
    total = add(x)
    x.drop()
    phases = F.conv2d(total, _channels_last(upsampling_weight(convolution.weight)), padding=1)
    return Pending(conv=phases, bias=convolution.bias, is_interleaved=True)


def _downsample(convolution: Any, x: Pending) -> Pending:
    padded = F.pad(add(x), (0, 1, 0, 1))
    x.drop()
    return Pending(conv=F.conv2d(padded, _channels_last(convolution.weight), stride=2), bias=convolution.bias)


def _first(convolution: Any, x: Tensor) -> Pending:
    """The first convolution, on few channels."""
    missing = -x.shape[1] % _ALIGNMENT
    weight = F.pad(_last_tap(convolution), (0, 0, 0, 0, 0, missing))
    x = F.pad(x, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
    return Pending(conv=F.conv2d(x, _channels_last(weight), padding=1), bias=convolution.bias)


def _last(convolution: Any, h: Tensor) -> Tensor:
    """The last convolution, to few channels, with its bias."""
    weight = _last_tap(convolution)
    missing = -weight.shape[0] % _ALIGNMENT
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing))
    bias = F.pad(convolution.bias, (0, missing))
    wide = F.conv2d(h, _channels_last(weight), bias, padding=1)
    return wide[:, : convolution.bias.numel()].contiguous(memory_format=torch.channels_last)


def _convolve(convolution: Any, h: Tensor) -> Tensor:
    """A 3x3 convolution without its bias."""
    return F.conv2d(h, _channels_last(_last_tap(convolution)), padding=1)


def _pointwise(convolution: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution with its bias, as a matrix product over the pixels."""
    weight = convolution.weight.flatten(1)  # every kernel dimension is 1
    return F.linear(x.permute(0, 2, 3, 1), weight, convolution.bias).permute(0, 3, 1, 2)


def _last_tap(convolution: Any) -> Tensor:
    """What a causal 3-D kernel does to a single frame, [O, I, 3, 3]."""
    weight: Tensor = convolution.weight[:, :, -1]
    return weight


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _gamma(module: Any) -> Tensor:
    gamma: Tensor = module.gamma.flatten()
    return gamma


_KNOWN = {
    stock.QwenImageEncoder3d,
    stock.QwenImageDecoder3d,
    stock.QwenImageMidBlock,
    stock.QwenImageUpBlock,
    stock.QwenImageResidualBlock,
    *IMAGE_MODULES.values(),
    nn.Conv2d,
    nn.Dropout,
    nn.Identity,
    nn.ModuleList,
    nn.Sequential,
    nn.SiLU,
    nn.ZeroPad2d,
}
