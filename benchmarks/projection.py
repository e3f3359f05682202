"""Projected time of a guided step on consumer cards, from their link and compute rates. Nothing is measured.

    python benchmarks/projection.py [--results FILE]

Plans are those that `enable_vram_management` makes, at true size and without weights. A step takes what
computing takes, or what copying takes if that is longer (expect 3 to 8 % more). Rates are assumptions, see
CARDS. On an H100, whose rates are known, the same arithmetic can be compared with benchmarks/offload.py.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import record
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from true_model import TEXT_CONFIG, VISION_CONFIG

from diffusers_qwenimage import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module
from diffusers_qwenimage.pipelines.needs import Demand
from diffusers_qwenimage.pipelines.rates import forward_flops
from diffusers_qwenimage.pipelines.vram_plan import Parts, PipelinePlan, plan_pipeline
from diffusers_qwenimage.quantize import quantize_

GIB = 2**30
RESERVED = 1.4  # GiB of a card that CUDA, its libraries and the buffer take


@dataclass(frozen=True, kw_only=True)
class Card:
    """Rates that a forward reaches: FLOP/s in bf16 and in fp8 (if it can), bytes/s from pinned memory."""

    name: str
    gib: int
    bf16: float
    fp8: float | None
    link: float


# Effective rates of a whole forward, derived from published figures of kernels like these; links are PCIe 4
# with 16 lanes (25 GB/s) or 8 (12.5), PCIe 5 with 16 (50).
CARDS = (
    Card(name="RTX 4060", gib=8, bf16=28e12, fp8=50e12, link=12.5e9),
    Card(name="RTX 3060", gib=12, bf16=24e12, fp8=None, link=25e9),
    Card(name="RTX 4070 Ti", gib=12, bf16=75e12, fp8=135e12, link=25e9),
    Card(name="RTX 4060 Ti", gib=16, bf16=40e12, fp8=70e12, link=12.5e9),
    Card(name="RTX 4080", gib=16, bf16=95e12, fp8=170e12, link=25e9),
    Card(name="RTX 3090", gib=24, bf16=65e12, fp8=None, link=25e9),
    Card(name="RTX 4090", gib=24, bf16=148e12, fp8=265e12, link=25e9),
    Card(name="RTX 5090", gib=32, bf16=200e12, fp8=310e12, link=50e9),
)


def main() -> None:
    """Print a table, and record it if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="table to append to")
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 1328])
    args = parser.parse_args()
    print("Projected, not measured: seconds of a guided step\n")
    print(
        "| card | weights | on the card | streams | pinned | "
        + " | ".join(f"{s}x{s}" for s in args.sides)
        + " |"
    )
    print("|---" * (5 + len(args.sides)) + "|")
    for weights in ("bf16", "fp8"):
        parts = model(weights)
        for card in CARDS:
            cells = []
            for side in args.sides:
                plan, seconds, resident = projected(parts, card, weights, side)
                cells.append(f"{seconds:.2f} s" + ("" if seconds > 1.005 * resident else " (hidden)"))
                if args.results:
                    case = f"{weights}, {side}x{side}, step with guidance, {card.gib} GB card"
                    record(
                        "projection",
                        case,
                        seconds,
                        "s (projected)",
                        peak_memory_gib=plan.peak_bytes / GIB,
                        device=f"projection: {card.name}",
                        path=args.results,
                    )
            stream: Any = plan.transformer
            sizes = (stream.resident_bytes, stream.streamed_bytes, plan.host_bytes)
            cells = [f"{size / GIB:.1f} GiB" for size in sizes] + cells
            print(f"| {card.name} {card.gib} GB | {weights} | {' | '.join(cells)} |")


def projected(parts: Parts, card: Card, weights: str, side: int) -> tuple[PipelinePlan, float, float]:
    """The plan, seconds of a guided step, and seconds if nothing streamed."""
    demand = Demand(rows=side // 16, columns=side // 16)
    plan = plan_pipeline(parts, int((card.gib - RESERVED) * GIB), demand, device="cuda:0", fused=True)
    rate = card.fp8 if weights == "fp8" and card.fp8 else card.bf16
    resident = forward_flops(parts.transformer, samples=2, tokens=demand.tokens // 2) / rate
    assert plan.transformer is not None
    return plan, plan.transformer.seconds_per_pass(compute=resident, link=card.link), resident


def model(weights: str) -> Parts:
    """The components at true size, without values."""
    texts = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "num_hidden_layers": 28}, vision_config=VISION_CONFIG
    )
    transformer = empty_module(QwenImageTransformer2DModel).to(torch.bfloat16)
    if weights != "bf16":
        quantize_(transformer, weights)
    return Parts(
        transformer=transformer,
        text_encoder=empty_module(lambda: Qwen2_5_VLForConditionalGeneration(texts)).to(torch.bfloat16),
        vae=empty_module(AutoencoderKLQwenImage).to(torch.bfloat16),
    )


if __name__ == "__main__":
    main()
