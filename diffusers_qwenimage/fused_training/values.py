"""What a block of `fused_training` works with: its layers, where its tokens are, and what is kept of a call.

Shapes: B samples, L image tokens and T text tokens of a sample, N tokens of a stream, S rows of the joint
buffer, D width, H heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from diffusers_qwenimage.kernels.attention_backward import Attended
from diffusers_qwenimage.streams import side_of

from .linear import Layer, Three

Rows = tuple[slice, slice]  # tokens of a sample in their stream, and in the joint buffer


class Keep(Enum):
    """What a block keeps for its backward pass; the rest is computed again."""

    ALL = "all"
    ATTENTION = "attention"  # and the results of the MLPs
    MLP = "mlp"  # the results of the MLPs: a third of the products need not be repeated
    NOTHING = "nothing"
    HOST = "host"  # nothing, and the inputs are moved to host memory


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The layers of one stream, image or text."""

    modulation: Layer
    three: Three
    query_norm: Tensor
    key_norm: Tensor
    out: Layer
    up: Layer
    down: Layer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, those that are used together behind each other."""
        single = [parameter for layer in (self.out, self.up, self.down) for parameter in layer.parameters]
        return [*self.modulation.parameters, *self.three.downs, *self.three.ups, *single]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Where the tokens of each sample are: in its stream, and in the joint buffer of `num_rows` rows."""

    image: Sequence[Rows]
    text: Sequence[Rows]
    lengths: tuple[int, ...]
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a block, without its streams.

    Attributes:
        block: the block, through which its hooks are reached.
        image, text: layers of the streams.
        heads: H.
        samples: where tokens are.
        temb: timestep embedding [B or 1, D].
        tables: rotary tables of the image tokens of a sample, and of all text tokens or those of a sample.
        keep: what is kept.
        needs_modulation: whether the modulation has trained weights.
        trained: the LoRA's weights, in the order that the operation takes them.
    """

    block: nn.Module
    image: Stream
    text: Stream
    heads: int
    samples: Samples
    temb: Tensor
    tables: tuple[Tensor, Tensor]
    keep: Keep
    needs_modulation: bool
    trained: list[nn.Parameter]


@dataclass(kw_only=True)
class StreamValues:
    """Intermediate values of one stream, in the order in which they come; [N, D] but where it is said.

    Attributes:
        x: the stream as it enters.
        modulation: [B or 1, 6 D]
        modulation_hidden, qkv_hidden, attention_hidden, up_hidden, mlp_hidden: x A^T of the LoRAs, [N, r].
        normed: input of queries, keys and values.
        attended: attention's result, input of the output projection.
        attention: the projection's result.
        middle: the stream after attention.
        second: input of the MLP.
        up: before GELU, [N, 4 D].
        active: after it.
        mlp: the MLP's result.
    """

    x: Tensor
    modulation: Tensor
    modulation_hidden: Tensor | None
    normed: Tensor | None = None
    qkv_hidden: Tensor | None = None
    attended: Tensor | None = None
    attention: Tensor | None = None
    attention_hidden: Tensor | None = None
    middle: Tensor | None = None
    second: Tensor | None = None
    up: Tensor | None = None
    up_hidden: Tensor | None = None
    active: Tensor | None = None
    mlp: Tensor | None = None
    mlp_hidden: Tensor | None = None


@dataclass(kw_only=True)
class Values:
    """Intermediate values of a block.

    Attributes:
        image, text: of the streams.
        joint: queries, keys and values as projected, [S, 3, H, head_dim].
        turned: queries and keys after norm and turn, [S, 2, H, head_dim].
        attended: attention of each group of samples (`groups_of`).
    """

    image: StreamValues
    text: StreamValues
    joint: Tensor | None = None
    turned: Tensor | None = None
    attended: list[Attended] = field(default_factory=list)


def streams_of(call: Call, values: Values) -> Iterator[tuple[int, Stream, StreamValues, Sequence[Rows]]]:
    """Place, layers, values and tokens of the text stream (1), then of the image stream (0).

    On a GPU the loop's body runs for the text on a stream beside: its few tokens cannot fill the device. The
    bodies must not depend on each other, and what they free must be their own.
    """
    side = side_of(call.temb.device, "text", wanted=True)
    with side:
        yield 1, call.text, values.text, call.samples.text
    yield 0, call.image, values.image, call.samples.image
    side.join()


def samples_of(batch: int, num_image: int, lengths: Sequence[int]) -> Samples:
    """Where the tokens of each sample lie: in their streams, and as [text; image] in the joint one.

    Args:
        batch: samples.
        num_image: image tokens of a sample.
        lengths: text tokens of each sample.
    """
    image, text, row, num_text = [], [], 0, 0
    for index, length in enumerate(lengths):
        middle, end = row + length, row + length + num_image
        text.append((slice(num_text, num_text + length), slice(row, middle)))
        image.append((slice(index * num_image, (index + 1) * num_image), slice(middle, end)))
        row, num_text = end, num_text + length
    assert len(lengths) == batch
    return Samples(image=image, text=text, lengths=tuple(lengths), num_rows=row)


def tables_of(call: Call, stream: Stream, rows: Sequence[Rows]) -> list[Tensor]:
    """The rotary table of each sample's tokens."""
    if stream is call.image:
        return [call.tables[0]] * len(rows)
    table = call.tables[1]
    if table.shape[0] == rows[-1][0].stop:  # packed: a row per token of all samples
        return [table[here] for here, _ in rows]
    return [table] * len(rows)


def groups_of(samples: Samples, joint: Tensor, turned: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values [B, H, S, head_dim] of samples that are attended together."""
    query, key, value = turned[:, 0], turned[:, 1], joint[:, 2]
    parts = [by_group(samples, part) for part in (query, key, value)]
    return list(zip(*parts, strict=True))


def by_group(samples: Samples, rows_SHd: Tensor) -> list[Tensor]:
    """[B, H, S, head_dim] for all samples if they are of one length, else for each."""
    if len(set(samples.lengths)) == 1:
        return [rows_SHd.unflatten(0, (len(samples.lengths), -1)).transpose(1, 2)]
    sizes = [
        image.stop - text.start for (_, image), (_, text) in zip(samples.image, samples.text, strict=True)
    ]
    return [part[None].transpose(1, 2) for part in rows_SHd.split(sizes)]


def gather(attended: Sequence[Attended], places: Sequence[slice]) -> Tensor:
    """Rows of attention's results, [N, D]."""
    rows = join([each.out.transpose(1, 2).flatten(0, 1) for each in attended])
    return join([rows[place] for place in places]).flatten(1)


def modulation_of_sample(part: StreamValues, index: int) -> tuple[Tensor, ...]:
    """Shift, scale, gate of both halves, [D] each, of one sample."""
    row = part.modulation[index if part.modulation.shape[0] > 1 else 0]
    return row.chunk(6)


def add_(sums: Tensor, index: int, gradients: dict[int, Tensor]) -> None:
    """Add gradients of shift, scale and gate, by their place, to those of one sample."""
    row = sums[index if sums.shape[0] > 1 else 0].view(6, -1)
    for place, gradient in gradients.items():
        row[place] += gradient


def join(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, without a copy where there is only one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def given(value: Tensor | None) -> Tensor:
    """A value that this call must have."""
    assert value is not None
    return value
