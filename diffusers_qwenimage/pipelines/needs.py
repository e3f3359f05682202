"""Device memory that the components need beside their weights, in bytes.

Computed from sizes, with factors measured on one H100: they are rounded up, and no promise. What a call has
taken is in `memory_report()`.

Widths: the number of tensors, as wide as the model, that are alive for each token at the worst moment.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_qwenimage.denoise import DenoiseInputs
from diffusers_qwenimage.kernels import backend

# Both branches of the guidance in one pass at 1328x1328 on the fused path; measured: 10.0 (bf16), 10.4 (fp8).
FUSED_DENOISE_WIDTHS = 11.0
DENOISE_WIDTHS = 15.5  # measured: 14 (1328x1328) and 15 (1024x1024)
# With `transformer.save_memory()`: the streams of all samples, and what one sample needs.
FRUGAL_STREAM_WIDTHS, FRUGAL_SAMPLE_WIDTHS = 2.0, 5.0
# Measured: 21.2 at 1328x1328 for the decoder, in tensors of `base_dim` channels per picture pixel.
DECODE_WIDTHS = 21.5
FUSED_DECODE_WIDTHS = 3.5  # measured: 2.3, by the fused path
BLEND_BYTES = 48  # per picture pixel of a tiled decode: sum and weights in fp32, and the result
TEXT_WIDTHS = 12.0
TEMPLATE_TOKENS = 64  # around a prompt
LEAST_PROMPT_TOKENS = 512  # are planned for
WORKSPACE = 64 * 2**20  # of cuBLAS and the attention kernels
TILE_SIDES = (192, 160, 128, 112, 96, 80, 64, 48, 32)  # latent pixels
TILE_OVERLAP = 0.25


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is to be made at once.

    Attributes:
        rows, columns: of image tokens in one picture.
        pictures: in the batch.
        guided: whether both branches of the guidance run together.
        text_tokens: of the longest prompt.
        steps: of the schedule, whose modulation is tabulated.
        reference_tokens: clean tokens beside the picture's.
    """

    rows: int
    columns: int
    pictures: int = 1
    guided: bool = True
    text_tokens: int = 256
    steps: int = 50
    reference_tokens: int = 0

    @property
    def samples(self) -> int:
        """Of a forward of the transformer: pictures, with both branches of the guidance."""
        return self.pictures * (2 if self.guided else 1)

    @property
    def tokens(self) -> int:
        """Tokens of all samples in a forward of the transformer."""
        return self.samples * (self.rows * self.columns + self.reference_tokens + self.text_tokens)

    def covers(self, other: "Demand") -> bool:
        """Whether what was planned for this suffices for `other`."""
        return (
            self.tokens >= other.tokens
            and self.steps >= other.steps
            and self.rows * self.columns >= other.rows * other.columns
        )

    def joined(self, other: "Demand") -> "Demand":
        """A demand that covers both."""
        larger, smaller = (self, other) if self.tokens >= other.tokens else (other, self)
        missing = max(0, smaller.rows * smaller.columns - larger.rows * larger.columns)
        return Demand(
            rows=larger.rows + -(-missing // larger.columns),
            columns=larger.columns,
            pictures=larger.pictures,
            guided=larger.guided,
            text_tokens=larger.text_tokens,
            steps=max(self.steps, other.steps),
            reference_tokens=larger.reference_tokens,
        )


def demand_of(inputs: DenoiseInputs) -> Demand:
    """What a call of the loop asks for."""
    _, rows, columns = inputs.image_shapes[0]
    embeds = [*inputs.prompt, *(inputs.negative or ())]
    return Demand(
        rows=rows,
        columns=columns,
        pictures=inputs.latents.shape[0],
        guided=inputs.negative is not None,
        text_tokens=max(sample.shape[0] for sample in embeds),
        steps=len(inputs.timesteps),
        reference_tokens=0 if inputs.reference is None else inputs.reference.shape[1],
    )


def denoise_bytes(
    transformer: Any, demand: Demand, dtype: torch.dtype, *, fused: bool = False, frugal: bool = False
) -> int:
    """Of a step: activations, and the table of the modulation.

    Args:
        fused: on the fused path.
        frugal: with `save_memory()` there.
    """
    widths = demand.tokens * (FUSED_DENOISE_WIDTHS if fused else DENOISE_WIDTHS)
    if frugal:
        one = demand.tokens // demand.samples
        widths = demand.tokens * FRUGAL_STREAM_WIDTHS + one * FRUGAL_SAMPLE_WIDTHS
    activations = int(widths * _width(transformer) * dtype.itemsize)
    return activations + _table_bytes(transformer, demand, dtype) + _workspace(activations)


def tabulate_bytes(transformer: Any, demand: Demand, dtype: torch.dtype) -> int:
    """Of tabulating the modulation: rows and their stack, while weights of two blocks visit."""
    visiting = 24 * _width(transformer) ** 2 * dtype.itemsize
    return 2 * _table_bytes(transformer, demand, dtype) + visiting


def encode_text_bytes(text_encoder: Any, demand: Demand) -> int:
    """Of a pass through the language model, of all prompts together: those of one length are."""
    tokens = max(LEAST_PROMPT_TOKENS, demand.pictures * (demand.text_tokens + TEMPLATE_TOKENS))
    config = getattr(text_encoder.config, "text_config", text_encoder.config)
    wide = 3 * config.intermediate_size + TEXT_WIDTHS * config.hidden_size
    activations = int(tokens * wide * 2)
    return activations + _workspace(activations)


def decode_bytes(vae: Any, rows: int, columns: int, *, tile: int | None = None, fused: bool = False) -> int:
    """Of decoding a picture of `rows` x `columns` latent pixels, in tiles of a side; encoding takes less."""
    ratio: int = vae.spatial_compression_ratio
    pixels = rows * columns * ratio**2
    widths = FUSED_DECODE_WIDTHS if fused else DECODE_WIDTHS
    per_pixel = widths * vae.config.base_dim * vae.dtype.itemsize
    if tile is None or (rows <= tile and columns <= tile):
        return int(pixels * per_pixel)
    cut = min(rows, tile) * min(columns, tile) * ratio**2
    return int(cut * per_pixel) + pixels * BLEND_BYTES


def fitting_tile(vae: Any, rows: int, columns: int, budget: int, *, fused: bool = False) -> int | None:
    """The largest side of a tile in latent pixels to decode within a budget; None if no tiles are needed."""
    if decode_bytes(vae, rows, columns, fused=fused) <= budget:
        return None
    for side in TILE_SIDES:
        size = decode_bytes(vae, rows, columns, tile=side, fused=fused)
        if side < max(rows, columns) and size <= budget:
            return side
    return TILE_SIDES[-1]


def denoises_fused(transformer: Any, device: torch.device) -> bool:
    """Whether the transformer will take its fused path, which needs less memory, on a device."""
    if not hasattr(transformer, "save_memory") or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return backend(device).name != "off"


@torch.no_grad()
def decodes_fused(vae: Any, device: torch.device) -> bool:
    """Whether the VAE will take its fused path, which needs a ninth of the memory, on a device."""
    if not hasattr(vae, "why_not_fused") or device.type != "cuda" or not torch.cuda.is_available():
        return False
    latents = torch.zeros(1, vae.config.z_dim, 1, 2, 2, device=device, dtype=vae.dtype)
    return vae.why_not_fused(latents) is None


def tile_stride(side: int) -> int:
    """Latent pixels from one tile to the next."""
    return max(1, side - int(side * TILE_OVERLAP))


def weight_bytes(module: nn.Module | None) -> int:
    """Of all parameters and buffers, shared ones once."""
    return 0 if module is None else sum(tensor.nbytes for tensor in _tensors(module))


def bytes_on(module: nn.Module | None, device: torch.device) -> int:
    """Those that lie on a device now."""
    if module is None:
        return 0
    return sum(tensor.nbytes for tensor in _tensors(module) if tensor.device.type == device.type)


def adapter_bytes(module: nn.Module | None) -> int:
    """Of the LoRA layers in a module, which stay on the device."""
    if module is None:
        return 0
    named = dict(module.named_parameters())
    return sum(value.nbytes for name, value in named.items() if ".lora_" in name)


def _width(transformer: Any) -> int:
    return int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)


def _table_bytes(transformer: Any, demand: Demand, dtype: torch.dtype) -> int:
    return int(demand.steps * transformer.config.num_layers * 12 * _width(transformer) * dtype.itemsize)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values()


def _workspace(activations: int) -> int:
    """Small models, such as those of tests, do not use the libraries' full workspaces."""
    return min(WORKSPACE, activations)
