"""Running a training step many times, quickly and by the clock."""

import math
import time
from collections.abc import Callable

import torch
from settings import Settings, note
from torch import Tensor, nn


class Clock:
    """How much of a stage's time is used, 0 to 1."""

    def __init__(self, end: float) -> None:
        self.start, self.end = time.monotonic(), end

    def used(self) -> float:
        return (time.monotonic() - self.start) / max(1e-3, self.end - self.start)


class Repeated:
    """Runs a training step over and over; on a GPU as a CUDA graph, which launches all kernels at once."""

    def __init__(self, take_step: Callable[[], tuple[Tensor, Tensor]], settings: Settings) -> None:
        self.take_step, self.use_graph = take_step, settings.graph and settings.device.type == "cuda"
        self.on_gpu = settings.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[Tensor, Tensor] | None = None
        self.calls = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.on_gpu and self.calls % 10 == 0:
            torch.cuda.synchronize()  # the clock must not run ahead of the GPU
        if not self.use_graph:
            return self.take_step()
        if self.calls <= 5:
            return self.warm_up()
        if self.graph is None or self.result is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.take_step()
            note("step captured")
        self.graph.replay()
        return self.result

    def warm_up(self) -> tuple[Tensor, Tensor]:
        """One step on a side stream, as capture needs."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.take_step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        return result


def make_optimizer(parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    on_gpu = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu)


def set_rate(
    optimizer: torch.optim.Optimizer, step: int, warmup: int, used: float, hold: float, peak: float
) -> None:
    """Linear warm-up by steps, a plateau until `hold`, then down to nothing along a cosine by the clock."""
    falling = max(0.0, min(1.0, (used - hold) / (1 - hold)))
    rate = peak * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * falling))
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)
