"""A block backward by hand, from the values of forward.py. Shapes as in values.py."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from diffusers_qwenimage.kernels.attention_backward import attend_backward
from diffusers_qwenimage.kernels.norm_backward import gate_norm_backward
from diffusers_qwenimage.kernels.rope_backward import norm_rotate_backward

from .linear import Factors
from .values import (
    Call,
    Rows,
    Samples,
    Stream,
    StreamValues,
    Values,
    add_,
    by_group,
    given,
    groups_of,
    join,
    modulation_of_sample,
    streams_of,
    tables_of,
)


def block_gradients(
    call: Call,
    values: Values,
    factors: Factors,
    grads: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, bool],
) -> list[Tensor | None]:
    """Gradients of the image and the text stream; those of the LoRA go to `factors`."""
    x = values.image.x
    grad_attended = x.new_empty(call.samples.num_rows, x.shape[1])
    sums = [torch.zeros_like(part.modulation, dtype=torch.float32) for part in (values.image, values.text)]
    middle: list[Tensor | None] = [None, None]
    for place, stream, part, rows in streams_of(call, values):
        grad = grads[place]
        if grad is not None:
            grad = grad.contiguous()
            middle[place] = _after_backward(stream, part, rows, factors, grad, grad_attended, sums[place])
            continue
        for _, there in rows:  # of the text stream of the last block: nothing comes after it
            grad_attended[there] = 0
    parts = _attention_backward(values, call.samples, grad_attended)
    grad_joint = _rotate_backward(call, values, parts)
    results: list[Tensor | None] = [None, None]
    activated = silu(call.temb)
    for place, stream, part, rows in streams_of(call, values):
        need_x = needed[place] or call.needs_modulation
        past, of_stream = middle[place], sums[place]
        found = _before_backward(stream, part, rows, factors, past, grad_joint, of_stream, need_x=need_x)
        if needed[place]:
            results[place] = found
        if call.needs_modulation:
            of_stream = of_stream.to(x.dtype)
            stream.modulation.backward(of_stream, activated, part.modulation_hidden, factors, None)
    return results


def _after_backward(
    stream: Stream,
    part: StreamValues,
    rows: Sequence[Rows],
    factors: Factors,
    grad: Tensor,
    grad_attended: Tensor,
    sums: Tensor,
) -> Tensor:
    """From the block's result back to attention's (into `grad_attended`); returns the gradient of x'."""
    assert part.middle is not None and part.up is not None and part.active is not None
    assert part.attention is not None and part.second is not None and part.attended is not None
    y = grad if part.mlp is None else part.mlp  # without it nobody needs the gate's gradient
    found = []
    for index, (here, _) in enumerate(rows):
        gate = modulation_of_sample(part, index)[5]
        found.append(gate_norm_backward(grad[here], None, grad[here], None, y[here], gate))
        add_(sums, index, {5: given(found[-1].gate)})
    grad_mlp = join([given(each.y) for each in found])
    del found, y
    part.mlp = None
    grad_up, part.active = part.active, None  # its memory: the last product that reads it comes before
    stream.down.backward(grad_mlp, grad_up, part.mlp_hidden, factors, grad_up)
    torch.ops.aten.gelu_backward.grad_input(grad_up, part.up, approximate="tanh", grad_input=grad_up)
    part.up = None
    grad_second = grad_mlp  # its memory: it is not needed any more
    stream.up.backward(grad_up, part.second, part.up_hidden, factors, grad_second)
    del grad_up
    found = []
    for index, (here, _) in enumerate(rows):
        _, _, gate, _, scale, _ = modulation_of_sample(part, index)
        of_second, attention = grad_second[here], part.attention[here]
        found.append(gate_norm_backward(part.middle[here], scale, grad[here], of_second, attention, gate))
        last = found[-1]
        add_(sums, index, {2: given(last.gate), 3: given(last.shift), 4: given(last.scale)})
    grad_attention = join([given(each.y) for each in found])
    into = grad_attended[rows[0][1]] if len(rows) == 1 else torch.empty_like(grad)
    stream.out.backward(grad_attention, part.attended, part.attention_hidden, factors, into)
    if len(rows) > 1:
        for here, there in rows:
            grad_attended[there] = into[here]
    return join([each.x for each in found])


def _attention_backward(values: Values, samples: Samples, grad_attended: Tensor) -> list[Tensor]:
    """Gradients of the turned queries and keys and of the values: three of [S, H, head_dim]."""
    assert values.joint is not None and values.turned is not None
    num_heads, head_dim = values.joint.shape[2:]
    grads = grad_attended.view(-1, num_heads, head_dim)
    groups = groups_of(samples, values.joint, values.turned)
    parts: list[list[Tensor]] = [[], [], []]
    for group, attended, grad in zip(groups, values.attended, by_group(samples, grads), strict=True):
        for found, of_kind in zip(attend_backward(attended, *group, grad), parts, strict=True):
            of_kind.append(found.transpose(1, 2).flatten(0, 1))
    values.attended = []
    return [join(of_kind) for of_kind in parts]


def _rotate_backward(call: Call, values: Values, parts: Sequence[Tensor]) -> Tensor:
    """Gradient of the joint buffer, [S, 3, H, head_dim]."""
    assert values.joint is not None
    grad_joint = torch.empty_like(values.joint)
    for _, stream, _, rows in streams_of(call, values):
        for (_, there), table in zip(rows, tables_of(call, stream, rows), strict=True):
            query, key, value = (part[there] for part in parts)
            norm_rotate_backward(
                grad_joint[there],
                values.joint[there],
                stream.query_norm,
                stream.key_norm,
                table,
                (query, key, value),
            )
    values.joint = values.turned = None
    return grad_joint


def _before_backward(
    stream: Stream,
    part: StreamValues,
    rows: Sequence[Rows],
    factors: Factors,
    grad: Tensor | None,
    grad_joint: Tensor,
    sums: Tensor,
    *,
    need_x: bool,
) -> Tensor | None:
    """From queries, keys and values back to the stream; `grad` is what reaches it past attention."""
    assert part.normed is not None
    of_three = join([grad_joint[there] for _, there in rows]).flatten(1)
    grad_normed = torch.empty_like(part.x) if need_x else None
    stream.three.backward(of_three, part.normed, part.qkv_hidden, factors, grad_normed)
    if grad_normed is None:
        return None
    found = []
    for index, (here, _) in enumerate(rows):
        scale = modulation_of_sample(part, index)[1]
        past = None if grad is None else grad[here]
        found.append(gate_norm_backward(part.x[here], scale, past, grad_normed[here]))
        add_(sums, index, {0: given(found[-1].shift), 1: given(found[-1].scale)})
    return join([each.x for each in found])
