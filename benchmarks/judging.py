"""What is shared by benchmarks that draw with the embedded checkpoint: arguments, judges, PSNR."""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import RESULTS

from diffusers_qwenimage import latents as packing

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny"))
from evaluate import EMBEDDED, Request  # noqa: E402
from judge import judge  # noqa: E402

Pictures = NDArray[np.uint8]
MOST_PROCESSES = 16


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What both benchmarks that draw with the embedded checkpoint can be told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint (the embedded one)")
    parser.add_argument("--number", type=int, default=200, help="captions (200)")
    parser.add_argument("--batch", type=int, default=200, help="pictures at a time (200)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    return parser


class Judges:
    """Make them before the GPU is used: they are forks of this process.

    Args:
        requests: whose pictures are judged, in order.
    """

    def __init__(self, requests: list[Request]) -> None:
        self._requests = requests
        number = min(os.cpu_count() or 1, MOST_PROCESSES, len(requests))
        self._pool = multiprocessing.get_context("fork").Pool(number, torch.set_num_threads, (1,))

    def percent_right(self, pictures: Pictures) -> float:
        """Of the pictures [N, H, W, 3] of all requests."""
        jobs = zip(pictures, self._requests, strict=True)
        return 100 * sum(self._pool.map(_is_right, jobs)) / len(self._requests)

    def stop(self) -> None:
        """End the processes."""
        self._pool.terminate()


def with_float32_noise(pipe: Any) -> Any:
    """`pipe`, called with noise drawn in float32: a generator gives other values in another type."""

    def call(
        prompts: list[str], *, generator: list[torch.Generator], height: int, width: int, **rest: Any
    ) -> Any:
        channels = pipe.transformer.config.in_channels // packing.PATCH**2
        rows, columns = packing.token_grid(pipe.vae_scale_factor, height, width)
        noise = packing.initial_noise(
            *(len(prompts), channels, rows, columns),
            generator=generator,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        return pipe(prompts, latents=noise, height=height, width=width, **rest)

    return call


def psnr(pictures: Pictures, exact: Pictures) -> float:
    """Mean over the pictures of their PSNR in dB; equal pictures count as 99."""
    errors = ((pictures.astype(np.float64) - exact) ** 2).mean(axis=(1, 2, 3))
    return float(np.minimum(10 * np.log10(255**2 / np.maximum(errors, 1e-9)), 99).mean())


def _is_right(job: tuple[Any, Request]) -> bool:
    picture, request = job
    return judge(picture, request.scene, request.caption).right
