"""A block of the transformer from the fused operations of `kernels`, for inference.

What it computes is `QwenImageTransformerBlock.forward`; the order of operations is chosen for the GPU:

* queries, keys and values of all tokens that attend to each other are written by the matrix products straight
  into one buffer, [text; image] per sample, where they are normalised and turned in place and where attention
  reads them: no concatenation and no copy;
* gate, residual, LayerNorm and modulation are one pass, GELU is the end of its matrix product;
* the text stream, whose few tokens cannot fill a GPU, can run beside the image stream, and so can the
  modulation of the next block (`text_beside_image`).

Gradients, compilation and hooks inside of a block take the block's plain path (`why_not`).

Shapes: B samples, L image tokens, T text tokens of all samples, D width, H heads, S rows of the joint buffer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from .kernels.norm import gate_add, gate_norm_modulate, norm_modulate
from .kernels.rope import norm_rotate_into
from .projections import (
    feed_forward,
    is_hooked,
    is_idle_dropout,
    is_plain_feed_forward,
    project,
    project_into,
    project_three_into,
)

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
_HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


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


@dataclass(frozen=True, kw_only=True)
class StreamModulation:
    """Modulation of one stream: six tensors [M, D], and which of the M each token has (None if M = 1)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor
    index: Tensor | None


def why_not(block: Any, image: Tensor, text: Tensor, modulation: tuple[Tensor, Tensor]) -> str | None:
    """Why this call cannot take the fused path; None if it can."""
    attn, streams = block.attn, (image, text, *modulation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*streams, *block.parameters())):
        return "gradients are recorded"
    if any(type(tensor) is not Tensor or tensor.dtype != image.dtype for tensor in streams):
        return "the streams are not plain tensors of one type"
    if image.dtype not in _TYPES:
        return f"the kernels are for {', '.join(map(str, _TYPES))}, not {image.dtype}"
    if torch.is_autocast_enabled(image.device.type):
        return "autocast is on"
    if attn.processor._parallel_config is not None or _is_sharded(attn):
        return "the model is spread over several devices"
    parts, attn_parts = block._modules, attn._modules  # quicker than attributes, and this runs in every block
    if is_hooked(attn) or any(is_hooked(parts[name]) for name in _NORMS):
        return "a hook is on a layer"
    for name in _HEAD_NORMS:
        norm = attn_parts[name]
        if type(norm) is not RMSNorm or is_hooked(norm) or norm.weight.dtype != image.dtype:
            return f"{name} is not a plain RMSNorm of the type of the tokens"
    if not (is_plain_feed_forward(block.img_mlp) and is_plain_feed_forward(block.txt_mlp)):
        return "an MLP was changed"
    if not is_idle_dropout(attn.to_out[1]):
        return "dropout is active"
    return None


def fused_block(
    block: Any,
    image_BLD: Tensor,
    text_BTD: Tensor,
    *,
    text_mask: Tensor | None,
    modulation: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    text_lengths: tuple[int, ...] | None,
    num_target_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """One block; arguments as in `QwenImageTransformerBlock.forward`.

    Returns:
        The image stream and the text stream.
    """
    device = image_BLD.device
    batch, num_image, width = image_BLD.shape
    lengths = text_lengths or (text_BTD.shape[1],) * batch
    layout = layout_of(num_image, lengths, device)
    image_modulation = _image_modulation(modulation[0], batch, num_image, num_target_tokens)
    text_modulation = _text_modulation(modulation[1], lengths)
    attn = block.attn
    image, text = image_BLD.reshape(-1, width), text_BTD.reshape(-1, width)
    joint = image.new_empty(layout.num_rows, 3, attn.heads, attn.head_dim)

    side = _Side(device)
    with side:
        _text_into(joint, layout, attn, text, text_modulation, tables[1])
    _image_into(joint, layout, attn, image, image_modulation, tables[0])
    side.join()
    attended = _attend(attn.processor, joint, layout, num_image, text_mask)

    with side:
        text_attention = project(_text_of(attended, layout), attn.to_add_out)
        text = _after_attention(block.txt_mlp, text, text_attention, text_modulation)
    image_attention = torch.empty_like(image)
    for index, (sample, length) in enumerate(zip(attended, lengths, strict=True)):
        project_into(
            image_attention[index * num_image : (index + 1) * num_image],
            sample[length:].flatten(1),
            attn.to_out[0],
        )
    image = _after_attention(block.img_mlp, image, image_attention, image_modulation)
    side.join()
    return image.view(image_BLD.shape), text.view(text_BTD.shape)


def _is_sharded(attn: Any) -> bool:
    """Whether tensor parallelism gave this rank some of the heads."""
    linear = getattr(attn.to_add_out, "base_layer", attn.to_add_out)
    return type(getattr(linear, "weight", None)).__name__ == "DTensor"


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
    indices = [
        _image_index(samples, regions, batch, num_image, border, device) for samples in {1, batch}
    ]  # one modulation for all samples, or one each
    kept = [layout.image_rows, layout.text_rows, _text_index(text_lengths, device), *indices]
    return [tensor for tensor in kept if tensor is not None]


def _image_modulation(
    modulation_BRD: Tensor, batch: int, num_image: int, num_target_tokens: int | None
) -> StreamModulation:
    samples, regions, _ = modulation_BRD.shape
    border = num_image if num_target_tokens is None or regions == 1 else num_target_tokens
    index = _image_index(samples, regions, batch, num_image, border, modulation_BRD.device)
    return _split(modulation_BRD.flatten(0, 1), index)


@lru_cache(maxsize=32)
def _image_index(
    samples: int, regions: int, batch: int, num_image: int, border: int, device: torch.device
) -> Tensor | None:
    if samples * regions == 1:
        return None
    region = (torch.arange(num_image) >= border).to(torch.int32)
    sample = torch.arange(batch, dtype=torch.int32)[:, None] * regions * (samples > 1)
    return (sample + region).flatten().to(device)


def _text_modulation(modulation_BD: Tensor, lengths: tuple[int, ...]) -> StreamModulation:
    index = None if modulation_BD.shape[0] == 1 else _text_index(lengths, modulation_BD.device)
    return _split(modulation_BD, index)


@lru_cache(maxsize=32)
def _text_index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    samples = torch.arange(len(lengths), dtype=torch.int32)
    return samples.repeat_interleave(torch.tensor(lengths)).to(device)


def _split(modulation_MD: Tensor, index: Tensor | None) -> StreamModulation:
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation_MD.chunk(6, dim=-1)
    return StreamModulation(
        shift1=shift1,
        scale1=scale1,
        gate1=gate1,
        shift2=shift2,
        scale2=scale2,
        gate2=gate2,
        index=index,
    )


def _text_into(
    joint: Tensor,
    layout: Layout,
    attn: Any,
    text: Tensor,
    modulation: StreamModulation,
    table: Tensor,
) -> None:
    """Queries, keys and values of the text tokens into their rows of the joint buffer."""
    modulated = norm_modulate(text, modulation.scale1, modulation.shift1, modulation.index)
    one_sample = len(layout.text_lengths) == 1
    qkv = joint[: text.shape[0]] if one_sample else joint.new_empty(text.shape[0], *joint.shape[1:])
    project_three_into(qkv.flatten(1), modulated, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    norm_rotate_into(
        joint,
        layout.text_rows,
        attn.norm_added_q.weight,
        attn.norm_added_k.weight,
        table,
        None if one_sample else qkv,
    )


def _image_into(
    joint: Tensor,
    layout: Layout,
    attn: Any,
    image: Tensor,
    modulation: StreamModulation,
    table: Tensor,
) -> None:
    """Queries, keys and values of the image tokens into their rows of the joint buffer."""
    modulated = norm_modulate(image, modulation.scale1, modulation.shift1, modulation.index)
    rows = joint.flatten(1)
    for tokens, start, length in zip(
        modulated.chunk(len(layout.starts)), layout.starts, layout.text_lengths, strict=True
    ):
        out = rows[start + length : start + length + tokens.shape[0]]
        project_three_into(out, tokens, (attn.to_q, attn.to_k, attn.to_v))
    norm_rotate_into(joint, layout.image_rows, attn.norm_q.weight, attn.norm_k.weight, table)


def _attend(
    processor: Any, joint: Tensor, layout: Layout, num_image: int, text_mask: Tensor | None
) -> Sequence[Tensor]:
    """Attention within each sample: [T_i + L, H, head_dim] per sample."""
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
    """Attention over `qkv` [B, S, 3, H, head_dim]: [B, S, H, head_dim]."""
    query, key, value = qkv.unbind(2)
    backend = processor._attention_backend
    if not (backend is None or AttentionBackendName(backend).value.lstrip("_").startswith("native")):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    joint: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
    return joint.to(qkv.dtype)


def _text_of(attended: Sequence[Tensor], layout: Layout) -> Tensor:
    """The text tokens of all samples, [T, D]."""
    parts = [sample[:length] for sample, length in zip(attended, layout.text_lengths, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _after_attention(mlp: Any, tokens: Tensor, attention: Tensor, modulation: StreamModulation) -> Tensor:
    """The rest of a block for one stream, [N, D]."""
    tokens, modulated = gate_norm_modulate(
        tokens, attention, modulation.gate1, modulation.scale2, modulation.shift2, modulation.index
    )
    tokens = gate_add(tokens, feed_forward(modulated, mlp), modulation.gate2, modulation.index)
    if tokens.dtype == torch.float16:  # outliers of this model exceed fp16
        tokens = tokens.clip(-65504, 65504)
    return tokens


class ModulationAhead:
    """Computes a block's modulation while the block before it runs.

    It reads more weights than the block's matrix products (a third of the model's) and does next to nothing
    with them: beside the image stream its time is hidden.
    """

    def __init__(self, blocks: Sequence[Any], regions_BRD: Tensor) -> None:
        self._blocks = blocks
        self._regions = regions_BRD
        self._side = _Side(regions_BRD.device)

    def start(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Start on block `index`; None if there is no such block, or it has to do this itself."""
        if index >= len(self._blocks) or not self._side.is_beside:
            return None
        block = self._blocks[index]
        if any(map(is_hooked, (block, *block.img_mod, *block.txt_mod))):  # weights may not be there yet
            return None
        with self._side:
            modulation: tuple[Tensor, Tensor] = block.modulation_of(self._regions)
        return modulation

    def join(self) -> None:
        """Let the current stream wait for what was started."""
        self._side.join()


class _Side:
    """Work beside the current stream of a GPU: `with side: ...`, then `side.join()`.

    Memory is safe because work runs here only between entering and joining, and waits at entering for all
    that the current stream was given before. Who enters keeps what the side reads alive until it joins.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" and text_beside_image else None
        self._entered: AbstractContextManager[Any] = nullcontext()

    @property
    def is_beside(self) -> bool:
        """Whether there is a second stream."""
        return self._stream is not None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            self._entered = torch.cuda.stream(self._stream)
        self._entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def join(self) -> None:
        """Let the current stream wait for the work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


# Whether the text stream and the next block's modulation run on a stream of their own.
text_beside_image = True


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
