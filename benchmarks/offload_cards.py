"""A projection: time of a guided step on consumer cards, from the rates of their link and their arithmetic.

    python benchmarks/offload_cards.py [--side 1024] [--text 128]

Nothing here was measured on these cards. The weights that stream are those of `plan_stream` for the published
model; the time is the longer of copying them and of computing, at the rates below: what such cards sustain in
matrix products in 16 bits, not what their makers print. 8-bit weights are multiplied out where they are used.
"""

import argparse
from dataclasses import dataclass

import torch

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module
from diffusers_qwenimage.offload import plan_stream
from diffusers_qwenimage.quantize import quantize_

GIB = 2**30
SYSTEM = 0.9 * GIB  # a desktop, the driver, the libraries' workspaces
WIDTHS = 9  # tensors as wide as the model that are alive for each token at the worst moment
STEPS = 50  # timesteps whose modulation is tabulated
WIDTH, BLOCKS, HEADS = 3072, 60, 24


@dataclass(frozen=True)
class Card:
    """A card: memory in GiB, link in GB/s, rate of matrix products and attention in TFLOP/s."""

    name: str
    memory: float
    link: float
    rate: float


CARDS = (
    Card("8 GB, x8 (RTX 4060)", 8, 12.5, 28),
    Card("12 GB (RTX 3060)", 12, 25, 24),
    Card("12 GB (RTX 4070 Ti)", 12, 25, 75),
    Card("16 GB (RTX 4080)", 16, 25, 95),
    Card("24 GB (RTX 3090)", 24, 25, 65),
    Card("24 GB (RTX 4090)", 24, 25, 145),
)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels (1024)")
    parser.add_argument("--text", type=int, default=128, help="tokens of each prompt (128)")
    args = parser.parse_args()
    models = {"bf16": transformer(None), "8-bit": transformer("fp8-storage")}
    image = (args.side // 16) ** 2
    print(f"Projection, {args.side}x{args.side}, guided step, milliseconds\n")
    print("| card | weights | resident, GB | over the link, GB | computing | copying | step |")
    print("|---|---|---|---|---|---|---|")
    for card in CARDS:
        for weights, model in models.items():
            budget = int(card.memory * GIB - SYSTEM - beside(image, args.text))
            plan = plan_stream(model, budget)
            compute = flops(image, args.text) / card.rate / 1e12
            copying = plan.streamed_bytes / card.link / 1e9
            step = plan.seconds_per_pass(compute=compute, link=card.link * 1e9)
            figures = f"{plan.resident_bytes / 1e9:.1f} | {plan.streamed_bytes / 1e9:.1f}"
            times = " | ".join(f"{1000 * seconds:.0f}" for seconds in (compute, copying, step))
            print(f"| {card.name} | {weights} | {figures} | {times} |")


def transformer(kind: str | None) -> QwenImageTransformer2DModel:
    """The published model's sizes."""
    model = empty_module(QwenImageTransformer2DModel).to(torch.bfloat16)
    if kind is not None:
        quantize_(model, kind)
    return model


def flops(image: int, text: int) -> float:
    """Floating-point operations of both branches: linear layers and attention."""
    tokens = image + text
    linear = 2 * 12 * WIDTH**2 * tokens * BLOCKS
    attention = 4 * tokens**2 * WIDTH * BLOCKS
    return 2.0 * (linear + attention)


def beside(image: int, text: int) -> float:
    """Bytes beside the weights: activations of both branches, and the table of the modulation."""
    activations = 2 * (image + text) * WIDTH * 2 * WIDTHS
    return activations + STEPS * BLOCKS * 12 * WIDTH * 2


if __name__ == "__main__":
    main()
