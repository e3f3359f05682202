"""Denoising with and without CUDA graphs, at the transformer's true size (random weights).

    python benchmarks/graphs.py [--sides 512] [--steps 12] [--blocks 60] [--device cuda] [--results FILE]

With guidance, 128 and 10 text tokens. A run is a whole loop, so that what graphs cost at its start is in the
figures of the first run. Needs 45 GB of device memory for 60 blocks.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from arms import GIB
from results import RESULTS, record
from torch import Tensor
from transformer_model import build, inputs_of

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.denoise import DenoiseInputs, denoise
from diffusers_qwenimage.graphs import graphs_of
from diffusers_qwenimage.kernels import backend
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024], help="sides of the picture")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (12)")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        record("graphs", case, value, unit, peak_memory_gib=peak, path=args.results)

    ours, stock = build(args.blocks, args.device)
    del stock
    print("fused path:", backend(ours.img_in.weight.device).name)
    for side in args.sides:
        compare(ours, side, args.steps, note)


@torch.no_grad()
def compare(ours: QwenImageTransformer2DModel, side: int, steps: int, note: Callable[..., None]) -> None:
    """Runs launched, first run with graphs, more runs in turn."""
    graphs = graphs_of(ours)
    graphs.mode = "off"
    run(ours, side, 3)  # kernels are compiled
    expected, launched, _ = run(ours, side, steps)
    graphs.mode = "auto"
    _, _, first = run(ours, side, steps)
    number = graphs.number
    totals: dict[str, list[float]] = {"launched": [], "graphs": []}
    times: dict[str, list[float]] = {"launched": launched, "graphs": []}
    for name in ("graphs", "launched", "launched", "graphs"):
        call = graphs._mode
        graphs._mode = "auto" if name == "graphs" else "off"  # without freeing them, as the setter would
        got, step_times, total = run(ours, side, steps)
        graphs._mode = call
        times[name] += step_times
        totals[name].append(total)
        if name == "graphs":
            equal = torch.equal(got, expected)
            note(f"{side}x{side} with guidance, graphs bit-equal to launches (1 = yes)", float(equal), "")
    note(f"{side}x{side} with guidance, graphs recorded", number, "")
    for name in times:
        note(f"{side}x{side} with guidance, step, {name}", statistics.median(times[name]), "ms")
        note(f"{side}x{side} with guidance, {steps} steps, {name}", statistics.median(totals[name]), "ms")
    note(f"{side}x{side} with guidance, {steps} steps, the run that measures and records", first, "ms")
    before = _emptied()
    graphs.release()
    held = before - _emptied()
    note(f"{side}x{side} with guidance, memory held by graphs", held / GIB, "GiB")


def run(ours: QwenImageTransformer2DModel, side: int, steps: int) -> tuple[Tensor, list[float], float]:
    """Latents, milliseconds of each step but the first, and of the whole loop by the clock."""
    one = inputs_of(ours, side)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    grid = side // 16
    inputs = DenoiseInputs(
        latents=one["hidden_states"],  # type: ignore[arg-type]
        timesteps=set_timesteps(scheduler, even_sigmas(steps), num_tokens=grid * grid, device=ours.device),
        prompt=[one["encoder_hidden_states"][0]],  # type: ignore[index]
        negative=[one["encoder_hidden_states"][0, :10]],  # type: ignore[index]
        guidance_scale=4.0,
        image_shapes=[(1, grid, grid)],
    )
    marks: list[float | torch.cuda.Event] = []

    def on_step(index: int, timestep: Tensor, latents: Tensor, prompt: object) -> tuple[Tensor, object]:
        marks.append(_mark(ours.device))
        return latents, prompt

    _wait(ours.device)
    start = time.perf_counter()
    latents = denoise(ours, scheduler, inputs, on_step=on_step)  # type: ignore[arg-type]
    _wait(ours.device)
    total = 1000 * (time.perf_counter() - start)
    return latents, [_between(a, b) for a, b in zip(marks, marks[1:], strict=False)], total


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    if isinstance(first, float):
        assert isinstance(second, float)
        return 1000 * (second - first)
    assert isinstance(second, torch.cuda.Event)
    return float(first.elapsed_time(second))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _emptied() -> int:
    """Bytes reserved on the device beside what can be given back."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


if __name__ == "__main__":
    main()
