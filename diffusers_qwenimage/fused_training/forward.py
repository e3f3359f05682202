"""A block forward by hand: up to attention, after it, and again in the backward pass what was not kept.

Functions that end in `_` put intermediate values into `StreamValues` and `Values`. Shapes as in values.py.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from diffusers_qwenimage.kernels.attention_backward import attend
from diffusers_qwenimage.kernels.matmul import linear_gelu
from diffusers_qwenimage.kernels.norm import gate_add, gate_norm_modulate, norm_modulate
from diffusers_qwenimage.kernels.rope_backward import norm_rotate_to

from .linear import Factors
from .values import (
    Call,
    Rows,
    Stream,
    StreamValues,
    Values,
    gather,
    groups_of,
    join,
    modulation_of_sample,
    streams_of,
    tables_of,
)


def start_values(call: Call, image: Tensor, text: Tensor, factors: Factors) -> Values:
    """The inputs of a block and its modulation."""
    activated, parts = silu(call.temb), []
    for stream, x in ((call.image, image), (call.text, text)):
        modulation, hidden = stream.modulation.apply(activated, factors)
        parts.append(StreamValues(x=x, modulation=modulation, modulation_hidden=hidden))
    return Values(image=parts[0], text=parts[1])


def attend_(call: Call, values: Values, factors: Factors) -> None:
    """Everything up to attention; attention itself only where its result was not kept."""
    x, num_rows = values.image.x, call.samples.num_rows
    head_dim = x.shape[1] // call.heads
    values.joint = x.new_empty(num_rows, 3, call.heads, head_dim)
    values.turned = x.new_empty(num_rows, 2, call.heads, head_dim)
    for _, stream, part, rows in streams_of(call, values):
        _before_attention_(stream, part, values.joint, rows, factors)
        for (_, place), table in zip(rows, tables_of(call, stream, rows), strict=True):
            turned, joint = values.turned[place], values.joint[place]
            norm_rotate_to(turned, joint, stream.query_norm, stream.key_norm, table)
    if not values.attended:
        groups = groups_of(call.samples, values.joint, values.turned)
        values.attended = [attend(*group) for group in groups]


def _before_attention_(
    stream: Stream, part: StreamValues, joint: Tensor, rows: Sequence[Rows], factors: Factors
) -> None:
    """Queries, keys and values of one stream into their rows of the joint buffer."""
    normed = []
    for index, (here, _) in enumerate(rows):
        shift, scale = modulation_of_sample(part, index)[:2]
        normed.append(norm_modulate(part.x[here], scale[None], shift[None]))
    part.normed = join(normed)
    if len(rows) == 1:
        there = joint[rows[0][1]].flatten(1)
        part.qkv_hidden = stream.three.write(there, part.normed, factors, part.qkv_hidden)
        return
    together = part.normed.new_empty(part.normed.shape[0], *joint.shape[1:])
    part.qkv_hidden = stream.three.write(together.flatten(1), part.normed, factors, part.qkv_hidden)
    for here, place in rows:
        joint[place] = together[here]


def attention_out_(
    stream: Stream, part: StreamValues, values: Values, rows: Sequence[Rows], factors: Factors
) -> None:
    """The output projection of attention, gate, residual, norm and modulation."""
    part.attended = gather(values.attended, [there for _, there in rows])
    part.attention, part.attention_hidden = stream.out.apply(part.attended, factors, part.attention_hidden)
    middle, second = [], []
    for index, (here, _) in enumerate(rows):
        _, _, gate, shift, scale, _ = modulation_of_sample(part, index)
        both = gate_norm_modulate(part.x[here], part.attention[here], gate[None], scale[None], shift[None])
        middle.append(both[0])
        second.append(both[1])
    part.middle, part.second = join(middle), join(second)


def mlp_(stream: Stream, part: StreamValues, rows: Sequence[Rows], factors: Factors, *, lean: bool) -> Tensor:
    """The MLP and the block's result; `lean` keeps no value in between."""
    assert part.middle is not None
    active = activate_(stream, part, factors, lean=lean)
    part.mlp, part.mlp_hidden = stream.down.apply(active, factors, part.mlp_hidden)
    results = []
    for index, (here, _) in enumerate(rows):
        gate = modulation_of_sample(part, index)[5]
        results.append(gate_add(part.middle[here], part.mlp[here], gate[None]))
    return join(results)


def activate_(stream: Stream, part: StreamValues, factors: Factors, *, lean: bool) -> Tensor:
    """GELU of the MLP's first layer, [N, 4 D]; its input is kept in `part` unless `lean` can do without."""
    assert part.second is not None
    plain = stream.up.plain
    if lean and plain is not None:
        return linear_gelu(part.second, *plain)
    part.up, part.up_hidden = stream.up.apply(part.second, factors, part.up_hidden)
    part.active = gelu(part.up, approximate="tanh")
    return part.active


def complete_(call: Call, values: Values, factors: Factors, *, needs_text: bool) -> None:
    """Compute again what was not kept and is needed."""
    if values.joint is None:
        attend_(call, values, factors)
    for _, stream, part, rows in streams_of(call, values):
        if stream is call.text and not needs_text:
            continue
        if part.middle is None:
            attention_out_(stream, part, values, rows, factors)
        if part.active is None:
            activate_(stream, part, factors, lean=False)
        if part.mlp is None:
            assert part.active is not None
            if call.needs_modulation:
                part.mlp, part.mlp_hidden = stream.down.apply(part.active, factors, part.mlp_hidden)
            elif part.mlp_hidden is None:  # the gate's gradient alone needs the result
                part.mlp_hidden = stream.down.hidden(part.active, factors)


def inputs_of(values: Values) -> Values:
    """What is kept if nothing is: the streams, and what is as thin as a LoRA."""
    return Values(image=_stream_inputs(values.image), text=_stream_inputs(values.text))


def _stream_inputs(part: StreamValues) -> StreamValues:
    return StreamValues(
        x=part.x,
        modulation=part.modulation,
        modulation_hidden=part.modulation_hidden,
        qkv_hidden=part.qkv_hidden,
        attention_hidden=part.attention_hidden,
        up_hidden=part.up_hidden,
        mlp_hidden=part.mlp_hidden,
    )


def move_inputs_(values: Values, device: torch.device) -> None:
    """Move the streams that a block starts from; to the host by way of pinned memory, without waiting."""
    for part in (values.image, values.text):
        if part.x.device == device:
            continue
        if device.type == "cpu":
            host = torch.empty_like(part.x, device="cpu", pin_memory=True)
            part.x = host.copy_(part.x, non_blocking=True)
        else:
            part.x = part.x.to(device, non_blocking=True)


def kept_of(values: Values, *, attention: bool) -> Values:
    """What is kept of the MLPs, and of attention."""
    image, text = (replace(_stream_inputs(part), mlp=part.mlp) for part in (values.image, values.text))
    return Values(image=image, text=text, attended=values.attended if attention else [])
