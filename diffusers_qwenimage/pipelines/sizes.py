"""The picture size that a checkpoint was made for: the default of a call, and a warning far from it."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

# Side of the pictures in latent pixels, in the transformer's config. Stock diffusers keeps fields that begin
# with "_" and does nothing with them.
SAMPLE_SIZE_FIELD = "_sample_size"
PUBLISHED_SAMPLE_SIZE = 128
PUBLISHED_LAYERS = 60
FAR = 4.0  # factor in area beyond which pictures suffer; Qwen-Image made for 1024x1024 still does 2048x2048


def recorded_sample_size(transformer: Any) -> int | None:
    """Side in latent pixels that the transformer's config states, None if it states none."""
    size = None if transformer is None else transformer.config.get(SAMPLE_SIZE_FIELD)
    return size if isinstance(size, int) and size > 0 else None


def warn_if_far(transformer: Any, height: int, width: int, *, scale_factor: int) -> None:
    """Warn of a size in pixels with an area more than `FAR` times above or below what it was made for.

    Nothing is said of a checkpoint that neither states its size nor is one of the published ones.
    """
    side = recorded_sample_size(transformer)
    if side is None and transformer.config.get("num_layers") == PUBLISHED_LAYERS:
        side = PUBLISHED_SAMPLE_SIZE
    if side is None:
        return
    made_for = side * scale_factor
    if not 1 / FAR <= height * width / made_for**2 <= FAR:
        logger.warning(
            "%dx%d pixels are far from the %dx%d that this checkpoint was made for; expect a poor picture.",
            *(width, height, made_for, made_for),
        )
