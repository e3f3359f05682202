"""A block of the transformer from the fused operations of `kernels`, for inference.

What it computes is `QwenImageTransformerBlock.forward`; the order of operations is chosen for the GPU:

* queries, keys and values of all tokens that attend to each other are written by the matrix products straight
  into one buffer, [text; image] per sample, where they are normalised and turned in place and where attention
  reads them: no concatenation and no copy;
* gate, residual, LayerNorm and modulation are one pass, GELU is the end of its matrix product;
* the text stream, whose few tokens cannot fill a GPU, can run beside the image stream, and so can the
  modulation of the next block (`text_beside_image`).

Layers in 8 bits get their inputs quantised by the operation before them. Gradients, compilation and hooks
inside of a block take the block's plain path (`plan_of`).

Shapes: B samples, L image tokens, T text tokens of all samples, D width, H heads, S rows of the joint buffer,
M modulations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from .block_boundary import Handover
from .kernels import backend
from .kernels.norm import attention_norm, mlp_add, mlp_add_norm, mlp_norm
from .kernels.quantized import quantize_rows
from .kernels.rope import norm_rotate_into
from .kernels.rows import Rows, Target
from .module_hooks import is_hooked
from .plan import Plan, Trio
from .projections import fuse_
from .streams import NoSide, Side, side_of

# Whether the text stream and the next block's modulation run on streams of their own.
text_beside_image = True
Tokens = Tensor | Rows


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch are in the joint buffer.

    Attributes:
        text_lengths: text tokens of each sample.
        starts: first row of each sample.
        num_rows: S.
        image_rows, text_rows: row of each token, [B L] and [T], int32.
    """

    text_lengths: tuple[int, ...]
    starts: tuple[int, ...]
    num_rows: int
    image_rows: Tensor
    text_rows: Tensor


def plan_of(block: Any, image: Tensor, text: Tensor, modulation: tuple[Tensor, Tensor]) -> Plan | None:
    """How the fused path computes this call; None if it cannot.

    The first time, the block's weights are laid out for it (`projections.fuse_`).
    """
    streams, dtype = (image, text, *modulation), image.dtype
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*streams, *block.parameters())):
        return None
    if any(type(tensor) is not Tensor or tensor.dtype is not dtype for tensor in streams):
        return None
    if torch.is_autocast_enabled(image.device.type):
        return None
    plan: Plan | None = block.plan
    if plan is None or not plan.holds(dtype, image.device):
        plan = block.plan = Plan(block, dtype, image.device)
        if plan.reason is not None:
            return None
    if not block.attn.is_laid_out:
        fuse_(block.attn)
        block.attn.is_laid_out = True
    return plan


def fused_block(
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
    handover: Handover | None = None,
) -> tuple[Tensor, Tensor]:
    """One block by its plan; the other arguments are as in `QwenImageTransformerBlock.forward`.

    Returns:
        The image stream [B, L, D] and the text stream, as they came.
    """
    device, dtype = image_BLD.device, image_BLD.dtype
    batch, num_image, width = image_BLD.shape
    triton = backend(device).name == "triton"
    layout = layout_of(num_image, text_lengths or (text_BTD.shape[1],) * batch, device)
    image_index = _image_index(modulation[0], batch, num_image, num_target_tokens)
    text_index = _text_index(modulation[1], layout)
    image_modulation, text_modulation = modulation[0].view(-1, 6 * width), modulation[1]
    attn = block.attn
    joint = torch.empty((layout.num_rows, 3, attn.heads, attn.head_dim), dtype=dtype, device=device)

    following = handover or Handover()
    normed = following.take(image_BLD, text_BTD, plan)
    side = side_of(device, "text", wanted=text_beside_image)
    with side:
        if normed is not None:
            tokens = normed[1]
        else:
            tokens = attention_norm(text_BTD, text_modulation, text_index, plan.text_qkv.target, triton)
        _text_into(joint, layout, plan.text_qkv, tokens, attn, tables[1])
    if normed is not None:
        tokens = normed[0]
    else:
        tokens = attention_norm(image_BLD, image_modulation, image_index, plan.image_qkv.target, triton)
    _image_into(joint, layout, plan.image_qkv, tokens, attn, tables[0])
    side.join()
    del tokens, normed
    attended: Sequence[Tokens] = _attend(attn.processor, joint, layout, num_image, text_mask)
    del joint  # half of what the MLP needs
    if plan.attended_target is not None:
        attended = [_quantize(sample, plan.attended_target) for sample in attended]

    # A copy, since the side stream may still read it below.
    text_attended = _text_of(attended, layout.text_lengths)
    with side:
        text_attention = plan.text_out(text_attended, dtype)
        target = plan.text_mlp.target
        text, tokens = mlp_norm(text_BTD, text_attention, text_modulation, text_index, target, triton)
        added = plan.text_mlp(tokens, dtype, triton=triton)
        text, next_text = _ended(text, added, text_modulation, following.text, text_index, triton)
    image_attention = torch.empty((batch * num_image, width), dtype=dtype, device=device)
    start = 0
    for sample, length in zip(attended, layout.text_lengths, strict=True):
        out = image_attention if batch == 1 else image_attention[start : start + num_image]
        plan.image_out.into(out, _rows(sample, length, length + num_image))
        start += num_image
    del attended, sample
    target = plan.image_mlp.target
    image, tokens = mlp_norm(image_BLD, image_attention, image_modulation, image_index, target, triton)
    del image_attention
    added = plan.image_mlp(tokens, dtype, triton=triton)
    del tokens
    image, next_image = _ended(image, added, image_modulation, following.image, image_index, triton)
    side.join()
    if next_image is not None and next_text is not None:
        following.give((image, text), (next_image, next_text))
    return image, text


@lru_cache(maxsize=32)
def layout_of(num_image: int, text_lengths: tuple[int, ...], device: torch.device) -> Layout:
    """The joint buffer of samples with `num_image` image tokens each and these numbers of text tokens."""
    starts, image_rows, text_rows, row = [], [], [], 0
    for length in text_lengths:
        starts.append(row)
        text_rows.append(torch.arange(row, row + length, dtype=torch.int32))
        image_rows.append(torch.arange(row + length, row + length + num_image, dtype=torch.int32))
        row += length + num_image
    with torch.inference_mode(False):
        return Layout(
            text_lengths,
            tuple(starts),
            row,
            torch.cat(image_rows).to(device),
            torch.cat(text_rows).to(device),
        )


def cached_tensors(
    num_image: int, text_lengths: tuple[int, ...], *, num_target_tokens: int | None, device: torch.device
) -> list[Tensor]:
    """The cached tensors that blocks read for such a batch, for who records addresses (`graphs.py`)."""
    batch, regions = len(text_lengths), 1 if num_target_tokens is None else 2
    border = num_image if num_target_tokens is None else num_target_tokens
    layout = layout_of(num_image, text_lengths, device)
    kept = [layout.image_rows, layout.text_rows, _sample_index(text_lengths, device)]
    for samples in {1, batch}:  # one modulation for all samples, or one each
        if samples * regions > 1:
            kept.append(_region_index(samples, regions, batch, num_image, border, device))
    return kept


def _image_index(
    modulation_BRD: Tensor, batch: int, num_image: int, num_target_tokens: int | None
) -> Tensor | None:
    samples, regions, _ = modulation_BRD.shape
    if samples * regions == 1:
        return None
    border = num_image if num_target_tokens is None or regions == 1 else num_target_tokens
    return _region_index(samples, regions, batch, num_image, border, modulation_BRD.device)


@lru_cache(maxsize=32)
def _region_index(
    samples: int, regions: int, batch: int, num_image: int, border: int, device: torch.device
) -> Tensor:
    region = (torch.arange(num_image) >= border).to(torch.int32)
    sample = torch.arange(batch, dtype=torch.int32)[:, None] * regions * (samples > 1)
    with torch.inference_mode(False):
        return (sample + region).flatten().to(device)


def _text_index(modulation_BD: Tensor, layout: Layout) -> Tensor | None:
    if modulation_BD.shape[0] == 1:
        return None
    return _sample_index(layout.text_lengths, modulation_BD.device)


@lru_cache(maxsize=32)
def _sample_index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    samples = torch.arange(len(lengths), dtype=torch.int32)
    with torch.inference_mode(False):
        return samples.repeat_interleave(torch.tensor(lengths)).to(device)


def _text_into(joint: Tensor, layout: Layout, trio: Trio, tokens: Tokens, attn: Any, table: Tensor) -> None:
    """Queries, keys and values of the text tokens into their rows of the joint buffer."""
    num_tokens, one_sample = sum(layout.text_lengths), len(layout.text_lengths) == 1
    qkv = joint[:num_tokens] if one_sample else joint.new_empty(num_tokens, *joint.shape[1:])
    trio.into(qkv.view(num_tokens, -1), tokens)
    weights = attn.norm_added_q.weight, attn.norm_added_k.weight
    norm_rotate_into(joint, layout.text_rows, *weights, table, None if one_sample else qkv)


def _image_into(joint: Tensor, layout: Layout, trio: Trio, tokens: Tokens, attn: Any, table: Tensor) -> None:
    """Queries, keys and values of the image tokens into their rows of the joint buffer."""
    rows = joint.view(layout.num_rows, -1)
    num_samples = len(layout.starts)
    num_image = layout.image_rows.shape[0] // num_samples
    for index, (start, length) in enumerate(zip(layout.starts, layout.text_lengths, strict=True)):
        out = rows[start + length : start + length + num_image]
        trio.into(
            out, tokens if num_samples == 1 else _rows(tokens, index * num_image, (index + 1) * num_image)
        )
    norm_rotate_into(joint, layout.image_rows, attn.norm_q.weight, attn.norm_k.weight, table)


def _attend(
    processor: Any, joint: Tensor, layout: Layout, num_image: int, text_mask: Tensor | None
) -> list[Tensor]:
    """Attention within each sample: [T_i + L, D] per sample."""
    if len(set(layout.text_lengths)) == 1:
        samples = joint.view(len(layout.starts), -1, *joint.shape[1:])
        mask = None
        if text_mask is not None:
            image_mask = text_mask.new_ones(text_mask.shape[0], num_image)
            mask = torch.cat([text_mask, image_mask], dim=1)[:, None, None]
        return list(_attention(processor, samples, mask).unbind())
    sizes = [length + num_image for length in layout.text_lengths]
    return [_attention(processor, sample[None], None)[0] for sample in joint.split(sizes)]


def _attention(processor: Any, qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over `qkv` [B, S, 3, H, head_dim]: [B, S, D]."""
    name = processor._attention_backend or _AttentionBackendRegistry._active_backend
    if name == AttentionBackendName.NATIVE:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
    query, key, value = qkv.unbind(2)
    if not AttentionBackendName(name).value.lstrip("_").startswith("native"):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    backend = processor._attention_backend
    joint: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
    return joint.to(qkv.dtype).flatten(2)


def _quantize(tokens: Tokens, target: Target) -> Rows:
    return tokens if isinstance(tokens, Rows) else quantize_rows(tokens, target)


def _rows(tokens: Tokens, start: int, end: int) -> Tokens:
    if isinstance(tokens, Rows):
        return Rows(tokens.values[start:end], tokens.scale[start:end])
    return tokens[start:end]


def _text_of(attended: Sequence[Tokens], lengths: Sequence[int]) -> Tokens:
    """The text tokens of all samples, [T, D], in memory of their own."""
    parts = [_rows(sample, 0, length) for sample, length in zip(attended, lengths, strict=True)]
    if isinstance(parts[0], Rows) and len(parts) == 1:
        return Rows(parts[0].values.clone(), parts[0].scale.clone())
    if isinstance(parts[0], Rows):
        # fp8 knows no concatenation
        values = torch.cat([part.values.view(torch.int8) for part in parts if isinstance(part, Rows)])
        scale = torch.cat([part.scale for part in parts if isinstance(part, Rows)])
        return Rows(values.view(parts[0].values.dtype), scale)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _added(tokens: Tensor, y: Tensor, modulation: Tensor, index: Tensor | None, triton: bool) -> Tensor:
    """The tokens of one stream after its MLP gave `y` [N, D]."""
    tokens = mlp_add(tokens, y, modulation, index, triton)
    if tokens.dtype == torch.float16:  # outliers of this model exceed fp16
        tokens = tokens.clip(-65504, 65504)
    return tokens


def _ended(
    tokens: Tensor,
    y: Tensor,
    modulation: Tensor,
    following: tuple[Tensor, Target | None] | None,
    index: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tokens | None]:
    """`_added`, and its result normalised for the next block, see `Handover`."""
    if following is None:
        return _added(tokens, y, modulation, index, triton), None
    return mlp_add_norm(tokens, y, modulation, following[0], index, following[1], triton)


class ModulationAhead:
    """Computes a block's modulation while the block before it runs, on a stream of its own.

    It reads more weights than the block's matrix products (a third of the model's) and does next to nothing
    with them: beside the image stream its time is hidden.
    """

    def __init__(self, blocks: Sequence[Any], regions_BRD: Tensor) -> None:
        self._blocks = blocks
        self._regions = regions_BRD
        self._side: Side | NoSide = side_of(regions_BRD.device, "modulation", wanted=text_beside_image)
        self._activated: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []  # until the current stream has read them

    def start(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Start on block `index`: its modulation, image [B, R, 6 D] and text [B, 6 D], complete after `join`.

        None if there is no such block, or it has to do this itself.
        """
        if index >= len(self._blocks) or isinstance(self._side, NoSide):
            return None
        block = self._blocks[index]
        parts = (block, block.img_mod, block.txt_mod, *block.img_mod, *block.txt_mod)
        if any(map(is_hooked, parts)):  # weights may not be there yet
            return None
        with self._side:
            if self._activated is None:
                self._activated = silu(self._regions)
            activated = self._activated
            image, text = block.img_mod[1], block.txt_mod[1]
            modulation = _linear(activated, image), _linear(activated[:, 0], text)
        self._kept.append(modulation)
        return modulation

    def join(self) -> None:
        """Let the current stream wait for what was started."""
        self._side.join()


def _linear(x: Tensor, module: nn.Module) -> Tensor:
    if type(module) is nn.Linear:
        return linear(x, module.weight, module.bias)
    result: Tensor = module(x)
    return result
