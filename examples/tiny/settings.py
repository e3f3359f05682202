"""What the training program is told, and its log."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: Path
    start: Path | None
    minutes: float
    minutes_vae: float
    scenes: int
    batch: int
    batch_vae: int
    rate: float
    rate_vae: float
    seed: int
    compile: bool
    graph: bool
    vae: Path | None
    data: Path | None
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )


def read_settings(description: str | None) -> Settings:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, from the program's start")
    parser.add_argument(
        "--minutes-vae", type=float, help="of these, for the VAE; 1.6, or 0 with --start or --vae"
    )
    parser.add_argument("--scenes", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batch-vae", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rate-vae", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--vae", type=Path, help="checkpoint whose VAE to start from; that of --start if not given"
    )
    parser.add_argument("--data", type=Path, help="scenes made by data.py, instead of making them now")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="without CUDA graphs")
    args = parser.parse_args()
    args.vae = args.vae or args.start
    if args.minutes_vae is None:
        args.minutes_vae = 0.0 if args.vae else 1.6
    return Settings(**vars(args))


def note(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def compiled(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if settings.compile else function
