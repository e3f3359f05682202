"""Rotary positions of Qwen-Image: one row per token, from the shapes of the images.

Each token has a position on three axes (frame, row, column). Rows and columns count from the centre of the
image, so that they are the same at every resolution near it. Text tokens follow on the diagonal, after the
largest image position. Angles are position / theta^(2k/d), as in RoFormer (arXiv 2104.09864).

Tables are a function of their arguments: nothing is stored in the weights, so they cannot be lost by meta
initialisation, cast by `.to(dtype)`, or left on another device.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedLayer3DRope
from torch import Tensor, nn

ImageShape = tuple[int, int, int]  # frames, rows, columns of tokens
THETA = 10000.0
CACHED_TABLES = 16


class RotaryEmbedding(nn.Module):
    """Rotary tables [tokens, head_dim / 2, 2] with the cosine and the sine of each pair's angle, fp32.

    Args:
        axes_dims: how many of a head's dimensions turn with the frame, the row and the column.
    """

    conditions_on_last_layer = False

    def __init__(self, axes_dims: Sequence[int]) -> None:
        nn.Module.__init__(self)  # not the second base of LayeredRotaryEmbedding
        if any(dim % 2 for dim in axes_dims):
            raise ValueError(f"axes_dims_rope must be even, got {tuple(axes_dims)}.")
        self.axes_dims = tuple(axes_dims)
        self._tables: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()

    def forward(
        self, image_shapes: Sequence[ImageShape], text_length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Tables of the image tokens (all shapes one after the other) and of `text_length` text tokens."""
        if torch.compiler.is_compiling():
            return self._build(image_shapes, text_length, device)
        key = (tuple(image_shapes), text_length, device)
        if key not in self._tables:
            # Built on the CPU so that every device has the same values; a step of training may read them too.
            with torch.inference_mode(False):
                image, text = self._build(image_shapes, text_length, torch.device("cpu"))
                self._tables[key] = image.to(device), text.to(device)
            if len(self._tables) > CACHED_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def _build(
        self, image_shapes: Sequence[ImageShape], text_length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        positions = [
            _grid(shape, self._frame_of(index, len(image_shapes)), device)
            for index, shape in enumerate(image_shapes)
        ]
        start = max(max(rows // 2, columns // 2) for _, rows, columns in image_shapes)
        if self.conditions_on_last_layer:
            start = max(start, len(image_shapes) - 1)
        text = torch.arange(start, start + text_length, device=device)
        return self._table(torch.cat(positions)), self._table(text[:, None].expand(-1, 3))

    def _frame_of(self, index: int, num_images: int) -> int:
        """Frame position of the image with this index."""
        return index

    def _table(self, positions: Tensor) -> Tensor:
        angles = []
        for axis, dim in enumerate(self.axes_dims):
            exponents = torch.arange(0, dim, 2, device=positions.device).to(torch.float32).div(dim)
            angles.append(torch.outer(positions[:, axis], 1.0 / torch.pow(THETA, exponents)))
        angle = torch.cat(angles, dim=1)
        return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


# diffusers' tests and its loaders tell the layered model by this class, hence the second base.
class LayeredRotaryEmbedding(RotaryEmbedding, QwenEmbedLayer3DRope):
    """For Qwen-Image-Layered: the last image is the condition and lies at frame -1."""

    conditions_on_last_layer = True

    def __init__(self, axes_dims: Sequence[int]) -> None:
        RotaryEmbedding.__init__(self, axes_dims)

    def _frame_of(self, index: int, num_images: int) -> int:
        return -1 if index == num_images - 1 else index


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn pairs of neighbouring dimensions of `x` [B, S, H, head_dim] by `table` [S, head_dim / 2, 2].

    The products are taken in fp32, the result has the type of `x`.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers know no complex numbers
        (even, odd), (cosine, sine) = pairs.unbind(-1), table[:, None].unbind(-1)
        rotated = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    else:  # one pass instead of six
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
        rotated = torch.view_as_real(turned)
    return rotated.flatten(-2).type_as(x)


def shapes_of_batch(img_shapes: Sequence[Any], num_tokens: int) -> list[ImageShape]:
    """The image shapes that every sample of a batch has, from diffusers' `img_shapes` argument.

    Args:
        img_shapes: one entry per sample: (frames, rows, columns), or a list of these where reference images
            follow the picture.
        num_tokens: image tokens per sample, to check against.

    Raises:
        ValueError: if the samples differ in shape, or the shapes do not make up `num_tokens`.
    """
    samples = [[sample] if isinstance(sample[0], int) else list(sample) for sample in img_shapes]
    first = [(int(frames), int(rows), int(columns)) for frames, rows, columns in samples[0]]
    if any(list(map(tuple, sample)) != first for sample in samples[1:]):
        raise ValueError(
            f"All images of a batch need the same shapes, got {img_shapes}. Call the model once per size."
        )
    if sum(map(prod, first)) != num_tokens:
        raise ValueError(
            f"`img_shapes` {first} are {sum(map(prod, first))} tokens, but hidden_states has {num_tokens}. "
            "Give (frames, height / 16, width / 16) for each image."
        )
    return first


def _grid(shape: ImageShape, first_frame: int, device: torch.device) -> Tensor:
    """Positions [frames * rows * columns, 3] of one image, rows and columns centred on zero."""
    frames, rows, columns = shape
    axes = (
        torch.arange(first_frame, first_frame + frames, device=device),
        torch.arange(-(rows - rows // 2), rows // 2, device=device),
        torch.arange(-(columns - columns // 2), columns // 2, device=device),
    )
    return torch.cartesian_prod(*axes)
