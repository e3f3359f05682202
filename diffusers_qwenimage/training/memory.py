"""What fits: which blocks keep their activations, and how much of the base may stay on the device.

Sizes are counted in units: the memory of one value of width D for every token of a batch, in the type that is
computed in. A block whose backward pass starts from everything keeps 20 units (its input 1, normed input 1,
queries, keys and values 3, turned queries and keys 2, attention's result 1, the projection's 1, both halves
of what follows 2, MLP 4 + 4 + 1, and 1 for small tensors); one that keeps attention's and the MLP's results
keeps 3, one that keeps the MLP's 2, one that keeps its input 1. While a block is computed backward, 24 units
exist on top of that: of the last block they exist in any case, and it keeps everything.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

UNITS = {"all": 20, "attention": 3, "mlp": 2, "nothing": 1, "host": 0}
WORKING_UNITS = 24
MODES = {"none": "all", "selective": "attention", "full": "nothing", "offload": "host"}
TEXT_TOKENS = 512  # of a sample, at most: what is counted for the text stream
RESERVE = 768 * 2**20  # for what is not counted: workspaces of libraries, rounding of the allocator


def plan_keep(
    mode: str, *, num_blocks: int, unit_bytes: int, free_bytes: int | None, trained_bytes: int = 0
) -> list[str]:
    """What each block keeps (`fused_training.Keep`).

    Args:
        mode: "none", "selective", "full", "offload" or "auto".
        num_blocks: blocks of the transformer.
        unit_bytes: bytes of a unit.
        free_bytes: what "auto" may fill; None: as "full", since nothing is known.
        trained_bytes: of the gradients, which grow while the activations of the blocks shrink.
    """
    if mode != "auto":
        return [*[MODES[mode]] * (num_blocks - 1), "all"]
    if free_bytes is None:
        return plan_keep("full", num_blocks=num_blocks, unit_bytes=unit_bytes, free_bytes=None)
    inputs = num_blocks * UNITS["nothing"]
    least = max(inputs, trained_bytes // max(unit_bytes, 1))
    left = free_bytes // max(unit_bytes, 1) - WORKING_UNITS - least
    keep = ["nothing"] * num_blocks
    for better in ("mlp", "attention", "all"):  # the time saved per byte is largest for the first
        for index in range(num_blocks - 1):
            cost = UNITS[better] - UNITS[keep[index]]
            if cost <= left:
                keep[index], left = better, left - cost
    keep[-1] = "all"
    logger.info(
        "Of %d blocks, %d keep everything, %d what attention and MLP give, %d the MLP, %d their input alone.",
        *(num_blocks, *(keep.count(kind) for kind in ("all", "attention", "mlp", "nothing"))),
    )
    return keep


def unit_bytes(
    transformer: Any, sizes: Sequence[tuple[int, int]], batch_size: int, dtype: torch.dtype
) -> int:
    """Bytes of a unit for batches of the largest of `sizes` (width, height in pixels)."""
    tokens = max(width * height for width, height in sizes) // 256 + TEXT_TOKENS
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    return int(tokens * batch_size * width * dtype.itemsize)


def weights_budget(limit: int, *, mode: str, num_blocks: int, unit: int, trained_bytes: int) -> int:
    """Bytes of `limit` that remain for the base when the run has what it needs.

    Trained weights count four times: themselves, two states of the optimizer, and their gradients, which
    grow while the activations of the blocks shrink.

    Raises:
        ValueError: if nothing remains.
    """
    keep = MODES.get(mode, "nothing")
    activations = UNITS[keep] * num_blocks * unit
    rest = 3 * trained_bytes + max(activations, trained_bytes) + WORKING_UNITS * unit + RESERVE
    if rest >= limit:
        raise ValueError(
            f"vram_limit is {limit / 2**30:.1f} GB, but trained weights, their optimizer and the activations "
            f"alone take {rest / 2**30:.1f} GB: lower lora_rank or the size of the pictures, or turn on "
            "use_gradient_checkpointing_offload."
        )
    return limit - rest


def text_encoder_budget(vram_limit: float | None) -> int | None:
    """Bytes for the text encoder's weights within a limit in GiB; nothing else is on the device with it."""
    return None if vram_limit is None else max(0, int(vram_limit * 2**30) - RESERVE)
