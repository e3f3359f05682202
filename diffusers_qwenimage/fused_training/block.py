"""The block as one operation of autograd, and when it can be used."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusers_qwenimage.module_hooks import is_hooked, is_idle_dropout, is_plain_feed_forward

from .backward import block_gradients
from .forward import attend_, attention_out_, complete_, inputs_of, kept_of, mlp_, move_inputs_, start_values
from .linear import Factors, Layer, Three, find_layer
from .values import Call, Keep, Stream, Values, samples_of, streams_of

_NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
_HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def why_not_trained(
    block: Any, image: Tensor, text: Tensor, text_mask: Tensor | None, temb: Tensor
) -> str | None:
    """Why a call with gradients cannot take this path; None if it can."""
    attn, parts = block.attn, block._modules
    if any(type(tensor) is not Tensor or tensor.dtype != image.dtype for tensor in (image, text, temb)):
        return "the streams are not plain tensors of one type"
    if image.dtype != torch.bfloat16 and (image.dtype != torch.float32 or image.device.type == "cuda"):
        return f"training is fused in bf16, not in {image.dtype}"
    if torch.is_autocast_enabled(image.device.type):
        return "autocast is on"
    if text_mask is not None or temb.ndim != 2 or temb.requires_grad:
        return "there is a mask, there are regions, or the timestep embedding is trained"
    if attn.processor._parallel_config is not None:
        return "the model is spread over several devices"
    if is_hooked(attn) or any(is_hooked(parts[name]) for name in _NORMS):
        return "a hook is on a layer"
    for name in _HEAD_NORMS:
        norm = attn._modules[name]
        if type(norm) is not RMSNorm or is_hooked(norm) or norm.weight.dtype != image.dtype:
            return f"{name} is not a plain RMSNorm of the type of the tokens"
        if norm.weight.requires_grad:
            return "other weights than a LoRA's are trained"
    if not (is_plain_feed_forward(block.img_mlp) and is_plain_feed_forward(block.txt_mlp)):
        return "an MLP was changed"
    if not is_idle_dropout(attn.to_out[1]):
        return "dropout is active"
    layers = [find_layer(module, image) for module in _linear_modules(block)]
    if any(layer is None for layer in layers):
        return "a linear layer has another adapter than a plain LoRA, or is hooked or trained"
    trained = any(layer.parameters for layer in layers if layer is not None)
    return None if trained else "nothing in the block is trained"


def trained_block(
    block: Any,
    image_BLD: Tensor,
    text_BTD: Tensor,
    *,
    temb: Tensor,
    tables: tuple[Tensor, Tensor],
    text_lengths: tuple[int, ...] | None,
    keep: Keep,
) -> tuple[Tensor, Tensor]:
    """One block with gradients; arguments as in `QwenImageTransformerBlock.forward`.

    Returns:
        The image stream [B, L, D] and the text stream, as they came.
    """
    call = open_call(block, image_BLD, text_BTD, temb, tables, text_lengths, keep)
    width = image_BLD.shape[-1]
    image, text = _Block.apply(call, image_BLD.reshape(-1, width), text_BTD.reshape(-1, width), *call.trained)
    return image.view(image_BLD.shape), text.view(text_BTD.shape)


class _Block(torch.autograd.Function):
    """A block as one operation: (image [B L, D], text [B T, D], LoRA weights) -> (image, text)."""

    @staticmethod
    def forward(ctx: Any, call: Call, image: Tensor, text: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        factors = Factors(call.trained, image.dtype)
        values = start_values(call, image, text, factors)
        attend_(call, values, factors)
        results, lean = {}, call.keep is not Keep.ALL
        for place, stream, part, rows in streams_of(call, values):
            attention_out_(stream, part, values, rows, factors)
            results[place] = mlp_(stream, part, rows, factors, lean=lean)
        if call.keep in (Keep.NOTHING, Keep.HOST):
            values = inputs_of(values)
        elif call.keep in (Keep.ATTENTION, Keep.MLP):
            values = kept_of(values, attention=call.keep is Keep.ATTENTION)
        if call.keep is Keep.HOST:
            move_inputs_(values, torch.device("cpu"))
        ctx.values = values
        return results[0], results[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_image: Tensor | None, grad_text: Tensor | None) -> tuple[Tensor | None, ...]:
        call, values = ctx.call, ctx.values
        ctx.values = None  # autograd keeps this node until the whole graph is gone
        needed = ctx.needs_input_grad[1:3]

        def work() -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                return None, *_backward(call, values, (grad_image, grad_text), needed)

        if not is_hooked(call.block):
            return work()
        with torch.enable_grad():  # tells hooks that stream weights in which direction to look ahead
            result: tuple[Tensor | None, ...] = call.block(work, None, None, None, None)
            return result


def _backward(
    call: Call, values: Values, grads: tuple[Tensor | None, Tensor | None], needed: tuple[bool, bool]
) -> list[Tensor | None]:
    """Gradients of the streams and of the LoRA's weights."""
    if call.keep is Keep.HOST:
        move_inputs_(values, call.temb.device)
    factors = Factors(call.trained, values.image.x.dtype)
    complete_(call, values, factors, needs_text=grads[1] is not None)
    return [*block_gradients(call, values, factors, grads, needed), *factors.gradients()]


def _linear_modules(block: Any) -> list[nn.Module]:
    """The linear layers of a block in the order of `_call`."""
    attn = block.attn
    return [
        block.img_mod[1],
        *(attn.to_q, attn.to_k, attn.to_v),
        attn.to_out[0],
        block.img_mlp.net[0].proj,
        block.img_mlp.net[2],
        block.txt_mod[1],
        *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        attn.to_add_out,
        block.txt_mlp.net[0].proj,
        block.txt_mlp.net[2],
    ]


def _stream(layers: Sequence[Layer], query_norm: Tensor, key_norm: Tensor) -> Stream:
    modulation, query, key, value, out, up, down = layers
    return Stream(
        modulation=modulation,
        three=Three(layers=(query, key, value)),
        query_norm=query_norm,
        key_norm=key_norm,
        out=out,
        up=up,
        down=down,
    )


def open_call(
    block: Any,
    image_BLD: Tensor,
    text_BTD: Tensor,
    temb: Tensor,
    tables: tuple[Tensor, Tensor],
    text_lengths: tuple[int, ...] | None,
    keep: Keep,
) -> Call:
    """The layers of a block and the places of the tokens."""
    attn = block.attn
    found = [find_layer(module, image_BLD) for module in _linear_modules(block)]
    layers = [layer for layer in found if layer is not None]
    assert len(layers) == len(found)
    batch, num_image, _ = image_BLD.shape
    image = _stream(layers[:7], attn.norm_q.weight, attn.norm_k.weight)
    text = _stream(layers[7:], attn.norm_added_q.weight, attn.norm_added_k.weight)
    return Call(
        block=block,
        image=image,
        text=text,
        heads=attn.heads,
        samples=samples_of(batch, num_image, text_lengths or (text_BTD.shape[1],) * batch),
        temb=temb.detach(),
        tables=tables,
        keep=keep,
        needs_modulation=bool(layers[0].parameters or layers[7].parameters),
        trained=[*image.parameters, *text.parameters],
    )
