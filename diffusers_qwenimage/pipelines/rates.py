"""How fast a device computes and gets data: measured in a moment, for estimates."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import linear

COPY_BYTES = 64 * 2**20
MATRIX_SIDE = 4096
MATRIX_SIDE_CPU = 512
REPEATS = 5  # at least
SECONDS = 0.03  # at least: clocks and links of an idle GPU take a while to reach their full rate
# A whole forward of the transformer reaches so much of the rate of a large matrix product (measured on an
# H100: 590 of 760 TFLOP/s).
EFFICIENCY = 0.75


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device.

    Attributes:
        flops: floating-point operations per second, of large matrix products.
        link: bytes per second from pinned host memory.
        measured: whether they were measured here.
    """

    flops: float
    link: float
    measured: bool


@lru_cache(maxsize=8)
def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device: takes about a tenth of a second and 200 MB, once per process."""
    side = MATRIX_SIDE if device.type == "cuda" else MATRIX_SIDE_CPU
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)
    product = _seconds(lambda: linear(x, weight), device)
    copy = _seconds(lambda: target.copy_(host, non_blocking=True), device)
    return Rates(flops=2 * side**3 / product, link=COPY_BYTES / copy, measured=True)


def forward_seconds(flops: float, rates: Rates) -> float:
    """Expected time of a forward of the transformer with all weights on the device."""
    return flops / (EFFICIENCY * rates.flops)


def forward_flops(transformer: Any, *, samples: int, tokens: int) -> float:
    """Floating-point operations of a forward for so many samples of so many tokens (text and image)."""
    config = transformer.config
    width: int = config.num_attention_heads * config.attention_head_dim
    per_token = 2 * 12 * width**2  # projections 4, MLP 8
    attention = 4 * tokens * width
    return float(config.num_layers * samples * tokens * (per_token + attention))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The best of a few runs."""
    run()
    _wait(device)
    times: list[float] = []
    while len(times) < REPEATS or sum(times) < SECONDS:
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(max(time.perf_counter() - start, 1e-9))
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
