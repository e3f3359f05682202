"""A block from the fused operations, in the least memory: one sample and one part of the block at a time.

What it computes is `fused_block`, in another order:

* attention, the image MLP and the text MLP one after the other, each for all samples, so that the weights of
  one part at a time have to be there (`hooked.visit`);
* in attention one sample at a time has its queries, keys and values; its result is added at once;
* the image MLP takes half of a sample's tokens at a time, which need less then than attention did;
* text tokens of all samples stay together: products of so few rows are summed in another order when their
  number changes.

Beside the streams of all samples, in place if that is allowed, this takes four tensors as wide as the model
for each token of one sample. Products of half as many rows read the same weights twice: for large pictures
that costs nothing.

Shapes: B samples, L image tokens, T text tokens of all samples, D width, H heads, M modulations.
"""

from typing import Any

import torch
from torch import Tensor

from .fused import (
    Tokens,
    _added,
    _attention,
    _image_index,
    _quantize,
    _rows,
    _text_index,
    _text_of,
    layout_of,
)
from .kernels import backend
from .kernels.norm import attention_norm, gate_add_, mlp_norm, second_norm
from .kernels.rope import norm_rotate_into
from .kernels.rows import Rows
from .module_hooks import visit
from .plan import Plan

ATTENTION_GATE, MLP_GATE = 2, 5  # their places in the modulation


def fused_in_parts(
    block: Any,
    plan: Plan,
    image_BLD: Tensor,
    text_BTD: Tensor,
    *,
    text_mask: Tensor | None,
    modulation: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    text_lengths: tuple[int, ...] | None,
    num_target_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """One block by its plan; arguments and result as of `fused_block`.

    The image stream is overwritten where the block may do that (`block.may_overwrite`).
    """
    batch, num_image, width = image_BLD.shape
    triton = backend(image_BLD.device).name == "triton"
    if not (block.may_overwrite and image_BLD.is_contiguous()):
        image_BLD = image_BLD.clone(memory_format=torch.contiguous_format)
    lengths = text_lengths or (text_BTD.shape[1],) * batch
    index = _image_index(modulation[0], batch, num_image, num_target_tokens)
    indices = [None] * batch if index is None else list(index.split(num_image))
    image_modulation = modulation[0].view(-1, 6 * width)
    text_index = _text_index(modulation[1], layout_of(num_image, lengths, image_BLD.device))

    with visit(block.attn):
        text_qkv = _text_qkv(block.attn, plan, text_BTD, modulation[1], text_index, tables[1], triton)
        text_parts: list[Tokens] = []
        start = 0
        for sample, length in enumerate(lengths):
            mask = None if text_mask is None else text_mask[sample : sample + 1]
            text_parts.append(
                _attend_(
                    block.attn,
                    plan,
                    image_BLD[sample],
                    text_qkv[start : start + length],
                    text_mask=mask,
                    modulation=image_modulation,
                    index=indices[sample],
                    table=tables[0],
                    triton=triton,
                )
            )
            start += length
        del text_qkv
        text_attention = plan.text_out(_text_of(text_parts, lengths), image_BLD.dtype)
    with visit(block.img_mlp):
        for tokens_LD, token_index in zip(image_BLD, indices, strict=True):
            for rows in _halves(num_image):
                part_index = None if token_index is None else token_index[rows]
                _image_mlp_(plan, tokens_LD[rows], image_modulation, part_index, triton)
    target = plan.text_mlp.target
    text, tokens = mlp_norm(text_BTD, text_attention, modulation[1], text_index, target, triton)
    with visit(block.txt_mlp):
        added = plan.text_mlp(tokens, text.dtype, triton=triton)
    return image_BLD, _added(text, added, modulation[1], text_index, triton)


def _text_qkv(
    attn: Any,
    plan: Plan,
    text_BTD: Tensor,
    modulation: Tensor,
    index: Tensor | None,
    table: Tensor,
    triton: bool,
) -> Tensor:
    """Queries, keys and values of the text tokens of all samples, [T, 3, H, head_dim]."""
    tokens = attention_norm(text_BTD, modulation, index, plan.text_qkv.target, triton)
    num_tokens = text_BTD.shape[0] * text_BTD.shape[1]
    shape = (num_tokens, 3, attn.heads, attn.head_dim)
    qkv = torch.empty(shape, dtype=text_BTD.dtype, device=text_BTD.device)
    plan.text_qkv.into(qkv.view(num_tokens, -1), tokens)
    rows = layout_of(0, (num_tokens,), qkv.device).text_rows
    norm_rotate_into(qkv, rows, attn.norm_added_q.weight, attn.norm_added_k.weight, table)
    return qkv


def _attend_(
    attn: Any,
    plan: Plan,
    image_LD: Tensor,
    text_qkv: Tensor,
    *,
    text_mask: Tensor | None,
    modulation: Tensor,
    index: Tensor | None,
    table: Tensor,
    triton: bool,
) -> Tokens:
    """Joint attention of one sample, added to its image stream in place; what its text tokens got."""
    num_image, num_text = image_LD.shape[0], text_qkv.shape[0]
    layout = layout_of(num_image, (num_text,), image_LD.device)
    joint = text_qkv.new_empty(layout.num_rows, *text_qkv.shape[1:])
    joint[:num_text].copy_(text_qkv)
    tokens = attention_norm(image_LD, modulation, index, plan.image_qkv.target, triton)
    plan.image_qkv.into(joint.view(layout.num_rows, -1)[num_text:], tokens)
    del tokens
    norm_rotate_into(joint, layout.image_rows, attn.norm_q.weight, attn.norm_k.weight, table)
    mask = None
    if text_mask is not None:
        mask = torch.cat([text_mask, text_mask.new_ones(1, num_image)], dim=1)[:, None, None]
    attended: Tokens = _attention(attn.processor, joint[None], mask)[0]
    del joint
    if plan.attended_target is not None:
        attended = _quantize(attended, plan.attended_target)
    of_text = _copied(_rows(attended, 0, num_text))
    out = torch.empty_like(image_LD)
    plan.image_out.into(out, _rows(attended, num_text, num_text + num_image))
    gate_add_(image_LD, out, modulation, index, triton, part=ATTENTION_GATE)
    return of_text


def _image_mlp_(
    plan: Plan, tokens_ND: Tensor, modulation: Tensor, index: Tensor | None, triton: bool
) -> None:
    """The MLP of some image tokens of one sample, added to them in place."""
    normalised = second_norm(tokens_ND, modulation, index, plan.image_mlp.target, triton)
    added = plan.image_mlp(normalised, tokens_ND.dtype, triton=triton)
    gate_add_(tokens_ND, added, modulation, index, triton, part=MLP_GATE)
    if tokens_ND.dtype == torch.float16:  # outliers of this model exceed fp16
        tokens_ND.clamp_(-65504, 65504)


def _halves(num_tokens: int) -> list[slice]:
    middle = -(-num_tokens // 2)
    return [slice(0, middle), slice(middle, num_tokens)] if num_tokens > 1 else [slice(0, num_tokens)]


def _copied(tokens: Tokens) -> Tokens:
    """In memory of its own: a view would keep all of a sample."""
    if isinstance(tokens, Rows):
        return Rows(tokens.values.clone(), tokens.scale.clone())
    return tokens.clone()
