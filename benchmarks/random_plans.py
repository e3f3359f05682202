"""Random budgets, sizes, batches and types: does a picture take more memory than its plan says?

    python benchmarks/random_plans.py [--count 100] [--seconds 60]

A model of the true width with few blocks and layers, so that a plan takes a second. Each plan is for a budget
of the whole device, drawn at random; a budget that is too small is refused, and counted. Then the prompt is
encoded, a few steps are made, and the pictures are decoded, while the allocator may not take more than the
budget leaves beside CUDA's own: it then gives memory back that it keeps for later, as on a card of that size.
Of each of these moments the most that was allocated is compared with what was expected, and of all of them
the most in use with the budget. `--tiny` takes the embedded checkpoint, for dry runs.
"""

import argparse
import gc
import random
import shutil
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from offload_model import allocated, cap, peaks, reset_peak, synchronize
from results import record
from true_model import add_options, write_model

from diffusers_qwenimage import QwenImagePipeline, default_checkpoint
from diffusers_qwenimage.offload import Source
from diffusers_qwenimage.pipelines.context import context_bytes, expected_context_bytes
from diffusers_qwenimage.pipelines.memory_report import MemoryReport
from diffusers_qwenimage.pipelines.needs import Demand
from diffusers_qwenimage.quantize import quantize_

GIB = 2**30
BUDGETS = (1.6, 5.0)  # GiB
SIDES = (256, 1664)  # pixels
BUFFER = 0.5  # GiB, the default
SOURCES: tuple[Source, ...] = ("pinned", "mapped", "mapped")  # of one budget they take the same on the device


def main() -> None:
    """Make plans until there are enough, the same number for each type of weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.set_defaults(blocks=3, layers=1)
    parser.add_argument("--tiny", action="store_true", help="use the embedded checkpoint instead")
    parser.add_argument("--weights", nargs="+", default=["bf16", "fp8"], help="types, bf16 first (bf16 fp8)")
    parser.add_argument("--count", type=int, default=100, help="of plans that are not refused (100)")
    parser.add_argument("--seconds", type=float, default=600, help="end after so long (600)")
    args = parser.parse_args()
    if not args.tiny:
        write_model(args.folder, args.blocks, args.layers)
    folder = default_checkpoint() if args.tiny else args.folder
    pipe = QwenImagePipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    if not args.tiny and not args.keep:
        shutil.rmtree(folder)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    draw, start, seen = random.Random(0), time.perf_counter(), Seen()
    for index, kind in enumerate(args.weights):
        if kind != "bf16":
            pipe.disable_vram_management(device)
            pipe.transformer.to(device)
            quantize_(pipe.transformer, kind)
        share = (index + 1) / len(args.weights)
        while seen.plans < share * args.count and time.perf_counter() - start < share * args.seconds:
            gc.collect()  # modules and hooks refer to each other in circles
            one_plan(pipe, draw, device, kind, seen)
    for case, value, unit in seen.rows():
        record("random_plans", case, value, unit, path=args.results)


@dataclass(kw_only=True)
class Seen:
    """What all plans came to, in GiB.

    Attributes:
        plans, refused: how many.
        failed: pictures that ran out of memory within their budget.
        beyond: the most in use on the device, less the budget.
        beyond_allocated: the most of tensors and CUDA's own, less the budget without its buffer.
        missing: by moment, what was allocated less what was expected.
    """

    plans: int = 0
    refused: int = 0
    failed: int = 0
    beyond: list[float] = field(default_factory=list)
    beyond_allocated: list[float] = field(default_factory=list)
    missing: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def rows(self) -> list[tuple[str, float, str]]:
        """Cases, values and units for the table."""
        rows: list[tuple[str, float, str]] = [
            ("plans (1 to 4 pictures of 256 to 1664 pixels)", self.plans, ""),
            ("budgets refused", self.refused, ""),
        ]
        if self.beyond:
            over = sum(value > 0 for value in self.beyond)
            too_much = sum(value > BUFFER for value in self.beyond_allocated)
            rows += [
                ("pictures that ran out of memory within their budget", self.failed, ""),
                ("plans with more in use on the device than their budget", over, ""),
                ("in use on the device less the budget, most", max(self.beyond), "GiB"),
                ("plans with tensors and CUDA's own of more than planned and the buffer", too_much, ""),
                ("tensors and CUDA's own less what was planned, most", max(self.beyond_allocated), "GiB"),
            ]
        for name, values in self.missing.items():
            rows.append((f"{name}: allocated less expected, most", max(values), "GiB"))
            rows.append((f"{name}: allocated less expected, least", min(values), "GiB"))
        return rows


def one_plan(
    pipe: QwenImagePipeline, draw: random.Random, device: torch.device, kind: str, seen: Seen
) -> None:
    """Draw a budget and a picture, plan, make the picture, and compare."""
    demand = Demand(
        rows=draw.randint(SIDES[0] // 16, SIDES[1] // 16),
        columns=draw.randint(SIDES[0] // 16, SIDES[1] // 16),
        pictures=draw.choice([1, 1, 2, 3, 4]),
        guided=draw.random() < 0.7,
        text_tokens=draw.randint(40, 500),
        steps=draw.choice([1, 2, 5]),
    )
    budget = draw.uniform(*BUDGETS)
    try:
        report = pipe.enable_vram_management(
            budget,
            vram_buffer=BUFFER,
            device=device,
            strict=True,
            source=draw.choice(SOURCES),
            demand=demand,
        )
    except ValueError as error:
        if "too few for pictures" not in str(error):
            raise
        seen.refused += 1
        return
    placed = allocated(device) / GIB, sum(part.resident for part in report.components) / GIB
    cap(device, budget - expected_context_bytes(device) / GIB)
    told = f"{kind}, {demand.pictures} of {16 * demand.columns}x{16 * demand.rows}, {budget:.2f} GiB"
    seen.plans += 1
    try:
        measured, reserved = make_picture(pipe, demand, device)
    except torch.OutOfMemoryError as error:
        seen.failed += 1
        print(f"{told}: {error}\n  {report}\n  {live_blocks()}", flush=True)
        return
    finally:
        cap(device, None)
    if device.type == "cuda":
        context = context_bytes(device) / GIB
        seen.beyond.append(reserved / GIB + context - budget)
        seen.beyond_allocated.append(max(measured.values()) / GIB + context - budget + BUFFER)
        moments = [f"placed {placed[0]:.3f} of {placed[1]:.3f}"]
        for name, value in measured.items():
            expected = expected_bytes(report, name) / GIB
            seen.missing[name].append(value / GIB - expected)
            moments.append(f"{name} {value / GIB:.3f} of {expected:.3f}")
        told += f": {reserved / GIB + context:.2f} in use; {', '.join(moments)}"
    print(told, flush=True)


def live_blocks() -> str:
    """The largest pieces of memory that are in use, in MiB, and how many of each size."""
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    sizes = Counter(block["size"] >> 20 for block in blocks if block["state"].startswith("active"))
    return ", ".join(f"{count} x {size}" for size, count in sorted(sizes.items(), reverse=True)[:12])


def expected_bytes(report: MemoryReport, moment: str) -> int:
    """Of a report's peaks; the modulation is tabulated before the first step."""
    if moment == "denoise":
        return max(report.peaks["tabulate"], report.peaks["denoise"])
    return report.peaks[moment]


@torch.no_grad()
def make_picture(pipe: QwenImagePipeline, demand: Demand, device: torch.device) -> tuple[dict[str, int], int]:
    """The most that was allocated in each moment, and the most reserved in all."""
    measured: dict[str, int] = {}
    reserved = 0

    def moment(name: str) -> None:
        nonlocal reserved
        synchronize(device)
        measured[name], most = peaks(device)
        reserved = max(reserved, most)
        reset_peak(device)

    height, width = 16 * demand.rows, 16 * demand.columns
    reset_peak(device)
    pipe.clear_prompt_cache()
    embeds = pipe.encode_prompt("word " * (demand.text_tokens - 2))[0][:, : demand.text_tokens]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    moment("text")
    latents: Any = pipe(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=embeds if demand.guided else None,
        negative_prompt_embeds_mask=mask if demand.guided else None,
        true_cfg_scale=4.0 if demand.guided else 1.0,
        num_images_per_prompt=demand.pictures,
        height=height,
        width=width,
        num_inference_steps=demand.steps,
        output_type="latent",
    ).images
    moment("denoise")
    channels = pipe.vae.config.z_dim
    unpacked = latents.new_zeros(demand.pictures, channels, 1, 2 * demand.rows, 2 * demand.columns)
    pipe.vae.decode(unpacked)
    moment("decode")
    return measured, reserved


if __name__ == "__main__":
    main()
