"""Streaming at the true size (60 blocks, random weights): time and memory of a guided step for budgets.

    python benchmarks/offload.py [--budgets 32 24 12 8 2 0.8] [--kind fp8 --kind-budgets 24 12 1.4]
        [--peers diffsynth group_offload]

A step is both branches of the guidance in one pass, 1328x1328, 128 and 10 text tokens, modulation tabulated.
The budget (GiB) holds for weights and activations: the process may not take more from the device
(`set_per_process_memory_fraction`). Times are of several steps in a row, so that copies for the next step are
counted. Results of all budgets are compared with that of the first, bit for bit. `--peers` measures
DiffSynth-Studio's CPU offload and diffusers' group offload over the same weights (offload_peers.py); `--rows`
compares products of fewer rows, as a budget that saves memory takes them, with those of all rows. `--device
cpu` with `--blocks 4 --width 2` dry-runs everything at a small size.
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from offload_model import (
    GIB,
    STEPS,
    Setting,
    allocated,
    beside_allocator,
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
from offload_peers import PEERS, measure_peers
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.kernels.matmul import linear_gelu_now, linear_into
from diffusers_qwenimage.offload import fetched_bytes, plan_stream, stream, unstream
from diffusers_qwenimage.offload.memory import HostMemory
from diffusers_qwenimage.pipelines.context import load_libraries
from diffusers_qwenimage.quantize import quantize_

SPARE = 350 * 2**20  # what the allocator may lose between pieces of other sizes
GUESS = 850 * 2**20  # of what a step needs beside the weights
FRUGAL_SPARE, FRUGAL_GUESS = 0.045, 296 * 2**20  # the same with `save_memory()`, a share and bytes
RETRY = 64 * 2**20  # less for weights where memory did not suffice
Note = Callable[..., None]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[32, 24, 12, 8, 2, 0.8], help="GiB, in bf16"
    )
    parser.add_argument("--kind", help="then quantise: fp8, int8 or fp8-storage")
    parser.add_argument("--kind-budgets", type=float, nargs="*", default=[24, 12, 1.4], help="GiB, then")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="others, in bf16: all, or these")
    parser.add_argument("--rows", action="store_true", help="products of fewer rows, bit for bit")
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

    beside = [beside_allocator(device)]
    if device.type == "cuda":
        load_libraries(device, torch.bfloat16)
    beside.append(beside_allocator(device))
    print(f"  CUDA's own {beside[0]:.3f} GiB, with its libraries {beside[1]:.3f} GiB", flush=True)
    if args.link:
        measure_link(device, note)
    model = host_model(setting)
    note("host memory of the process with the weights", resident_memory(), "GiB")
    step = guided_step(model, setting)
    if args.budgets:
        measure_budgets(model, step, setting, args.budgets, note)
    if args.rows:
        compare_rows(setting, note)
    unstream(model)
    weights = (
        {name: value.detach() for name, value in model.state_dict().items()} if args.peers is not None else {}
    )
    if args.kind:
        prefix = args.kind
        quantise(model, args.kind, device, note)
        measure_budgets(model, step, setting, args.kind_budgets, note)
    if args.peers is not None:
        prefix = "bf16"
        unstream(model, device="meta")
        measure_peers(args.peers or list(PEERS), weights, setting, note)


def quantise(model: QwenImageTransformer2DModel, kind: str, device: torch.device, note: Note) -> None:
    """Quantise the blocks on the device; the modulation stays on the host."""
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
    blocks = plan_stream(model, None, device=str(setting.device), split=False)
    note("smallest budget for weights, 1 slot for parts of blocks", least.smallest_bytes / GIB, "GiB")
    note("the same, 3 slots", least.smallest_overlapping_bytes / GIB, "GiB")
    note("smallest budget for weights, 2 slots for blocks", blocks.smallest_overlapping_bytes / GIB, "GiB")
    first: Tensor | None = None
    for budget in budgets:
        limit = int(budget * GIB) - GUESS - SPARE
        frugal = limit < blocks.smallest_overlapping_bytes
        if frugal:
            limit = int(budget * GIB * (1 - FRUGAL_SPARE)) - FRUGAL_GUESS
        model.save_memory(frugal)
        label = f"budget {budget:g} GiB" + (", saving memory" if frugal else "")
        result = None
        for less in (0, RETRY):
            limit = max(limit - less, least.smallest_bytes)
            try:
                result = measure(model, step, setting, label, limit, budget, note)
                break
            except torch.OutOfMemoryError:
                traceback.print_exc()
                cap(setting.device, None)
        if result is None:
            continue
        first = result if first is None else first
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
    budget: float,
    note: Note,
) -> Tensor:
    """Time and memory of a step under a limit for weights and a budget for all; its result."""
    device = setting.device
    empty_cache(device)
    if allocated(device) < budget * GIB:
        cap(device, budget)  # else the weights are on their way out of the device
    memory = resident_memory()
    start = time.perf_counter()
    plan = stream(model, device=device, vram_limit=limit, on_call=("img_mod", "txt_mod"))
    synchronize(device)
    note(f"{label}, placing the weights", time.perf_counter() - start, "s")
    empty_cache(device)
    cap(device, budget)
    print(f"  {plan}, process {memory:.2f} -> {resident_memory():.2f} GiB")
    placed = beside_allocator(device)
    reset_peak(device)
    result = step()
    step()
    before = fetched_bytes(model)
    times = [timed(step, device) for _ in range(setting.repeats)]
    moved = (fetched_bytes(model) - before) / setting.repeats / STEPS
    peak, reserved = peaks(device)
    slots = f"{plan.num_slots} slots" + (" for parts of blocks" if plan.is_split else "")
    note(f"{label}, step", statistics.median(times), "ms", peak / GIB)
    print(
        f"  CUDA's own {placed:.3f} GiB with pinned memory, {beside_allocator(device):.3f} GiB with kernels"
    )
    note(f"{label}, reserved on the device", reserved / GIB, "GiB")
    note(f"{label}, weights on the device ({slots})", plan.device_bytes / GIB, "GiB")
    note(f"{label}, pinned", plan.pinned_bytes / GIB, "GiB")
    note(f"{label}, over the link per step", moved / 1e9, "GB")
    note(f"{label}, host memory of the process", resident_memory(), "GiB")
    cap(device, None)
    return result.cpu()


@torch.no_grad()
def compare_rows(setting: Setting, note: Note) -> None:
    """Products of the image MLP for all tokens of both branches, and for fewer rows, bit for bit."""
    device, width = setting.device, 128 * setting.width
    tokens = (setting.side // 16) ** 2
    generator = torch.Generator(device).manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)

    up, down = random(4 * width, width) * 0.02, random(width, 4 * width) * 0.02
    bias_up, bias_down = random(4 * width), random(width)
    x = random(2 * tokens, width)

    def mlp(rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden = linear_gelu_now(rows, up, bias_up, triton=device.type == "cuda")
        out = torch.empty_like(rows)
        linear_into(out, hidden, down, bias_down)
        return hidden, out

    whole = mlp(x)
    for count in sorted({tokens, -(-tokens // 2), -(-tokens // 3), 1024}, reverse=True):
        parts = [torch.cat(part) for part in zip(*(mlp(rows) for rows in x.split(count)), strict=True)]
        for name, part, all_rows in zip(("first layer", "second layer"), parts, whole, strict=True):
            note(f"MLP of {count} rows, {name}, equal (1 = yes)", float(torch.equal(part, all_rows)), "")


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
