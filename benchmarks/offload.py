"""Streaming at the true size (60 blocks, random weights): time and memory of a guided step for budgets.

    python benchmarks/offload.py [--budgets 2 8 12 24 32] [--kind fp8 --kind-budgets 24 8 1.4]

A step is both branches of the guidance in one pass, 1328x1328, 128 and 10 text tokens, modulation tabulated.
The budget (GiB) holds for weights and activations: the process may not take more from the device
(`set_per_process_memory_fraction`). Times are of several steps in a row, so that copies for the next step are
counted. Results of all budgets are compared with each other, bit for bit. `--device cpu` with
`--blocks 4 --width 2` dry-runs everything at a small size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from offload_model import (
    GIB,
    STEPS,
    Setting,
    allocated,
    cap,
    empty_cache,
    guided_step,
    host_model,
    peaks,
    reset_peak,
    resident_memory,
    synchronize,
    timed,
)
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.offload import fetched_bytes, plan_stream, stream, unstream
from diffusers_qwenimage.offload.memory import HostMemory
from diffusers_qwenimage.quantize import quantize_

SPARE = 350 * 2**20  # what the allocator may lose between pieces of other sizes
FRUGAL = 1.0  # GiB: below, `save_memory()`
FIRST_GUESS = 700 * 2**20  # of what a step needs beside the weights, until it was measured
Note = Callable[..., None]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=[2, 8, 12, 24, 32], help="GiB, in bf16")
    parser.add_argument("--kind", help="then quantise: fp8, int8 or fp8-storage")
    parser.add_argument("--kind-budgets", type=float, nargs="*", default=[24, 8, 1.4], help="GiB, then")
    parser.add_argument("--link", action="store_true", help="rates of pinning and of the link")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--width", type=int, default=24, help="heads of 128 dimensions (24)")
    parser.add_argument("--side", type=int, default=1328, help="side of the picture (1328)")
    parser.add_argument("--repeats", type=int, default=2, help="groups of steps that are timed (2)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    setting = Setting(
        device=device,
        blocks=args.blocks,
        width=args.width,
        side=args.side,
        repeats=args.repeats,
    )
    prefix = "bf16"

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        label = f"{prefix}, {case}" if args.blocks == 60 else f"{prefix}, {args.blocks} blocks, {case}"
        record("offload", label, value, unit, peak_memory_gib=peak, path=args.results)

    if args.link:
        measure_link(device, note)
    model = host_model(setting)
    note("host memory of the process with the weights", resident_memory(), "GiB")
    step = guided_step(model, setting)
    if args.budgets:
        measure_budgets(model, step, setting, args.budgets, note)
    if args.kind:
        prefix = args.kind
        quantise(model, args.kind, device, note)
        measure_budgets(model, step, setting, args.kind_budgets, note)


def quantise(model: QwenImageTransformer2DModel, kind: str, device: torch.device, note: Note) -> None:
    """Quantise the blocks on the device; the modulation stays on the host."""
    unstream(model, device=None)
    for block in model.transformer_blocks:
        for part in (block.attn, block.img_mlp, block.txt_mlp):
            part.to(device)
    synchronize(device)
    start = time.perf_counter()
    quantize_(model, kind)
    synchronize(device)
    note("quantising on the device", time.perf_counter() - start, "s")


def measure_budgets(
    model: QwenImageTransformer2DModel,
    step: Callable[[], Tensor],
    setting: Setting,
    budgets: list[float],
    note: Note,
) -> None:
    """Every budget; results are compared with that of the first."""
    least = plan_stream(model, None, device=str(setting.device))
    note("smallest budget for weights, 2 slots", least.smallest_overlapping_bytes / GIB, "GiB")
    note("smallest budget for weights, 1 slot", least.smallest_bytes / GIB, "GiB")
    first: Tensor | None = None
    beside = FIRST_GUESS
    for budget in budgets:
        frugal = budget < FRUGAL
        model.save_memory(frugal)
        limit = max(int(budget * GIB) - beside - SPARE, least.smallest_bytes)
        label = f"budget {budget:g} GiB" + (", saving memory" if frugal else "")
        try:
            number = 1 if frugal else None
            limit = least.smallest_bytes if frugal else limit
            result, needed = measure(model, step, setting, label, limit, number, budget, note)
        except torch.OutOfMemoryError as error:
            print(f"{label}: {error}")
            cap(setting.device, None)
            continue
        first = result if first is None else first
        beside = beside if frugal else needed
        note(f"{label}, equal to the first (1 = yes)", float(torch.equal(result, first)), "")
        difference = (result.float() - first.float()).norm() / first.float().norm()
        note(f"{label}, relative difference to the first", float(difference), "")
    model.save_memory(False)


def measure(
    model: QwenImageTransformer2DModel,
    step: Callable[[], Tensor],
    setting: Setting,
    label: str,
    limit: int,
    num_slots: int | None,
    budget: float | None,
    note: Note,
) -> tuple[Tensor, int]:
    """Time of a step under a limit; its result, and the bytes that it needs beside the weights."""
    device = setting.device
    if num_slots is not None:
        limit += (num_slots - 1) * plan_stream(model, limit, device=str(device), num_slots=1).slot_bytes
    empty_cache(device)
    if budget is not None and allocated(device) < budget * GIB:
        cap(device, budget)  # else the weights are on their way out of the device
    memory = resident_memory()
    start = time.perf_counter()
    on_call = ("img_mod", "txt_mod", "norm_out") if model.separate_guidance else None
    plan = stream(model, device=device, vram_limit=limit, num_slots=num_slots, on_call=on_call)
    synchronize(device)
    note(f"{label}, placing the weights", time.perf_counter() - start, "s")
    empty_cache(device)
    cap(device, budget)
    print(f"  {plan}, process {memory:.2f} -> {resident_memory():.2f} GiB")
    reset_peak(device)
    result = step()
    step()
    before = fetched_bytes(model)
    steps = 1 if model.separate_guidance else STEPS
    times = [timed(step, device, steps) for _ in range(setting.repeats)]
    moved = (fetched_bytes(model) - before) / setting.repeats / steps
    peak, reserved = peaks(device)
    note(f"{label}, step", statistics.median(times), "ms", peak / GIB)
    note(f"{label}, reserved on the device", reserved / GIB, "GiB")
    note(f"{label}, weights on the device ({plan.num_slots} slots)", plan.device_bytes / GIB, "GiB")
    note(f"{label}, pinned", plan.pinned_bytes / GIB, "GiB")
    note(f"{label}, over the link per step", moved / 1e9, "GB")
    cap(device, None)
    return result.cpu(), peak - plan.device_bytes


def measure_link(device: torch.device, note: Note) -> None:
    """Rates of pinning fresh memory and of copies from it, one block's slab at a time."""
    size, memory = 453 * 10**6, HostMemory(device)
    start = time.perf_counter()
    slab = memory.slab(size)
    slab.tensor.fill_(1)
    filled = time.perf_counter()
    slab = memory.pin(slab)
    pinned = time.perf_counter()
    note("filling fresh host memory", size / (filled - start) / 1e9, "GB/s")
    note(f"pinning it ({memory.how})", size / (pinned - filled) / 1e9, "GB/s")
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def copies() -> None:
        for _ in range(10):
            target.copy_(slab.tensor, non_blocking=True)

    copies()
    milliseconds = timed(copies, device, 1)
    note("copies from pinned memory", 10 * size / milliseconds / 1e6, "GB/s")


if __name__ == "__main__":
    main()
