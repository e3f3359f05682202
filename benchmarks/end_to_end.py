"""Whole pictures, from a prompt to a Pillow image: ours beside its peers, over the same weights, one process.

    python benchmarks/end_to_end.py [--cases 1328:8] [--arms ours diffusers ...] [--results FILE]

Transformer, text encoder and autoencoder of the true size (random weights), guidance 4. Each arm makes a
first picture, with all that it compiles, tries out and records, and a second; Triton's cache starts empty,
and the first arm also finds every library cold. Then arms run in turn, back and forth (A B C C B A): median,
and the range. What `optimize` of ours takes is in a row of its own. Prompts differ from call to call, so that
no arm finds an embedding of before. An arm whose package is missing is left out with a word.

What caches decide on random weights means nothing: "every second step" forces them (their quality:
benchmarks/step_reduction.py). 62 GB of device memory; every 8-bit arm adds 14.
"""

import argparse
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from arms import GIB, synchronize
from end_to_end_arms import ARMS, Draw, Weights, embedded_weights, random_weights
from results import RESULTS, record

from diffusers_qwenimage.kernels import set_backend

DEFAULT = ("ours", "diffusers", "diffusers, compiled", "diffsynth")
PROMPT = (
    "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating, clear "
    "light and shadow, surrounded by bubbles, a calm face, rich details, a dreamy and beautiful picture."
)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=["1328:8"], metavar="SIDE:STEPS", help="pictures to make (1328:8)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(DEFAULT), help="what to compare")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of A B B A (1), or none")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--layers", type=int, default=28, help="layers of the text encoder (28)")
    parser.add_argument("--tiny", action="store_true", help="use the embedded checkpoint instead")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    cases = [(int(side), int(steps)) for side, steps in (case.split(":") for case in args.cases)]
    set_backend("auto")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        compare(args, cases)


class Case:
    """One size of picture and number of steps."""

    def __init__(self, side: int, steps: int, args: argparse.Namespace) -> None:
        self.side, self.steps, self.args = side, steps, args
        self.times: dict[str, list[float]] = {}
        self.pictures: dict[str, Any] = {}

    def note(self, case: str, value: float, unit: str, peak: float | None = None) -> None:
        """Record a row."""
        label = f"{self.side}x{self.side}, {self.steps} steps with guidance, {case}"
        record("end_to_end", label, value, unit, peak_memory_gib=peak, path=self.args.results)

    def draw(self, name: str, draw: Draw, *, stages: str = "") -> float:
        """Seconds of a picture; `stages`: which picture it is, to record how they divide."""
        number = len(self.times.setdefault(name, []))
        steps: list[float] = []

        def on_step() -> None:
            synchronize()
            steps.append(time.perf_counter())

        if self.args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        image = draw(f"{number}. {PROMPT}", self.side, self.steps, on_step)
        end = time.perf_counter()
        seconds = end - start
        self.times[name].append(seconds)
        self.pictures.setdefault(name, np.asarray(image, dtype=np.float64))
        if stages:
            self.note(f"{name}: {stages} picture", seconds, "s", peak_memory(self.args.device))
            self.note(f"{name}: {stages} picture, to the end of its first step", steps[0] - start, "s")
            self.note(f"{name}: {stages} picture, from its last step on", end - steps[-1], "s")
        return seconds

    def report(self) -> None:
        """Medians of all pictures but the first, and how far apart arms are."""
        exact = next(iter(self.pictures))
        for name, times in self.times.items():
            if self.args.rounds and len(times) > 2:
                self.note(f"{name}: picture", statistics.median(times[1:]), "s")
                print(f"    {min(times[1:]):.3f} to {max(times[1:]):.3f} s", flush=True)
            self.note(f"{name}: first picture over the median of the others", ratio(times), "")
            if name != exact:
                error = max(((self.pictures[name] - self.pictures[exact]) ** 2).mean(), 1e-9)
                self.note(f"{name}: PSNR to {exact}", float(10 * np.log10(255**2 / error)), "dB")


def compare(args: argparse.Namespace, cases: list[tuple[int, int]]) -> None:
    """Build the arms one after the other, draw their first pictures, then all in turn."""
    print(f"imports: {age():.1f} s since the process began", flush=True)
    if args.tiny:
        weights = embedded_weights(args.device)
    else:
        weights = random_weights(args.blocks, args.layers, args.device)
    synchronize()
    print(f"weights: {age():.1f} s", flush=True)
    measured = [Case(side, steps, args) for side, steps in cases]
    draws: dict[str, Draw] = {}
    failed = []
    for name in args.arms:
        try:
            draws[name] = first_pictures(name, weights, measured)
        except ImportError as error:
            print(f"{name}: left out, {error}", flush=True)
        except Exception:  # the figures of the other arms are still wanted; the exit code tells
            traceback.print_exc()
            failed.append(name)
            for case in measured:
                case.times.pop(name, None)
                case.pictures.pop(name, None)
    for _ in range(args.rounds):
        for name in (*draws, *reversed(draws)):
            for case in measured:
                case.draw(name, draws[name])
    for case in measured:
        if case.pictures:
            case.report()
    if failed:
        raise SystemExit(f"Failed, see above: {', '.join(failed)}")


def first_pictures(name: str, weights: Weights, measured: list[Case]) -> Draw:
    """Build an arm and draw the first two pictures of every case."""
    synchronize()
    start = time.perf_counter()
    draw = ARMS[name](weights)
    synchronize()
    seconds = time.perf_counter() - start
    measured[0].note(f"{name}: building the pipeline from modules on the device", seconds, "s")
    for case in measured:
        for stage in ("first", "second"):
            case.draw(name, draw, stages=stage)
    return draw


def age() -> float:
    """Seconds since this process began."""
    return time.time() - float(psutil.Process().create_time())


def ratio(times: list[float]) -> float:
    """The first over the median of the others."""
    return times[0] / statistics.median(times[1:])


def peak_memory(device: str) -> float | None:
    """GiB, of a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if device.startswith("cuda") else None


if __name__ == "__main__":
    main()
