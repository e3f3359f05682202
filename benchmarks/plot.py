"""Bars of the last figures in results.csv, for the README.

    pip install matplotlib
    python benchmarks/plot.py [--results FILE] [--out FILE.png] [--device H100]

A bar is the newest row of its benchmark and case on that device. What was not measured is left out and named.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from results import RESULTS, rows_of  # noqa: E402

OUT = Path(__file__).with_name("speed.png")
BESIDE = "1328x1328 forward beside eager peers"
COMPILED = "1328x1328 forward beside compiled peers"
PICTURE = "1328x1328, 8 steps with guidance"
STOCK, OURS, STOCK_LOSSY, LOSSY = "#9aa3ad", "#2f6fb3", "#ccd2d8", "#7fb4e0"


@dataclass(frozen=True)
class Bar:
    """One bar: its label, where its figure is, and its colour."""

    label: str
    benchmark: str
    case: str
    colour: str


PANELS: dict[str, list[Bar]] = {
    "Forward, 1328x1328 (ms)": [
        Bar("diffusers", "transformer", f"{BESIDE}, diffusers", STOCK),
        Bar("DiffSynth-Studio", "transformer", f"{BESIDE}, DiffSynth-Studio", STOCK),
        Bar("diffusers, compiled", "transformer", f"{COMPILED}, diffusers, compiled", STOCK),
        Bar("ours, bf16", "transformer", f"{BESIDE}, ours, modulation tabulated", OURS),
        Bar(
            "torchao fp8, compiled",
            "transformer",
            f"{COMPILED}, diffusers + torchao float8, compiled",
            STOCK_LOSSY,
        ),
        Bar("ours, fp8", "transformer", f"{BESIDE}, ours, fp8, modulation tabulated, CUDA graph", LOSSY),
    ],
    "Picture, 1328x1328, 8 guided steps (s)": [
        Bar("diffusers", "end_to_end", f"{PICTURE}, diffusers: picture", STOCK),
        Bar("DiffSynth-Studio", "end_to_end", f"{PICTURE}, diffsynth: picture", STOCK),
        Bar("diffusers, compiled", "end_to_end", f"{PICTURE}, diffusers, compiled: picture", STOCK),
        Bar("ours", "end_to_end", f"{PICTURE}, ours: picture", OURS),
    ],
    "LoRA training step, 1024x1024, rank 32 (ms)": [
        Bar(
            "diffusers + PEFT",
            "training",
            "1024x1024, rank 32, 60 blocks, diffusers + PEFT, checkpointing",
            STOCK,
        ),
        Bar(
            "DiffSynth-Studio",
            "training",
            "1024x1024, rank 32, 60 blocks, DiffSynth-Studio, checkpointing",
            STOCK,
        ),
        Bar(
            "ours, checkpointing",
            "training",
            "1024x1024, rank 32, 60 blocks, ours, bf16, checkpointing full",
            OURS,
        ),
        Bar(
            "ours, without", "training", "1024x1024, rank 32, 60 blocks, ours, bf16, checkpointing none", OURS
        ),
    ],
    "Guided step, 1024x1024 (ms)": [
        Bar("diffusers", "transformer", "1024x1024 step with guidance, diffusers (two forwards)", STOCK),
        Bar(
            "ours",
            "transformer",
            "1024x1024 step with guidance, ours (packed, modulation tabulated)",
            OURS,
        ),
    ],
    "Guided step, 512x512 (ms)": [
        Bar("ours, launched", "graphs", "512x512 with guidance, step, launched", OURS),
        Bar("ours, CUDA graph", "graphs", "512x512 with guidance, step, graphs", OURS),
    ],
    "Decoding, 1328x1328 (ms)": [
        Bar("diffusers", "vae", "1328x1328 decode, diffusers", STOCK),
        Bar("ours", "vae", "1328x1328 decode, ours, fused", OURS),
    ],
    "Encoding, 1328x1328 (ms)": [
        Bar("diffusers", "vae", "1328x1328 encode, diffusers", STOCK),
        Bar("ours", "vae", "1328x1328 encode, ours, fused", OURS),
    ],
}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to read")
    parser.add_argument("--out", type=Path, default=OUT, help="picture to write")
    parser.add_argument("--device", default="H100", help="rows whose device has this in its name")
    args = parser.parse_args()
    figures, device = read(args.results, args.device)
    panels = {}
    for title, bars in PANELS.items():
        missing = [bar for bar in bars if (bar.benchmark, bar.case) not in figures]
        for bar in missing:
            print(f"not measured: {bar.benchmark}: {bar.case}")
        found = [bar for bar in bars if bar not in missing]
        if len(found) > 1:
            panels[title] = [(bar, figures[bar.benchmark, bar.case]) for bar in found]
    if not panels:
        raise SystemExit(f"{args.results} has nothing to compare on {args.device}.")
    draw(panels, device, args.out)
    print(args.out)


def read(path: Path, device: str) -> tuple[dict[tuple[str, str], float], str]:
    """The newest value of each benchmark and case, and the full name of the device."""
    figures, name = {}, device
    for row in rows_of(path, device):
        figures[row["benchmark"], row["case"]] = float(row["value"])
        name = row["device"]
    return figures, name


def draw(panels: dict[str, list[tuple[Bar, float]]], device: str, out: Path) -> None:
    """One panel of horizontal bars for each comparison."""
    columns = 2
    rows = -(-len(panels) // columns)
    numbers = [len(bars) for bars in panels.values()]
    heights = [max(numbers[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(10, 0.6 + 0.5 * rows + 0.3 * sum(heights)),
        squeeze=False,
        height_ratios=[height + 0.4 for height in heights],
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for number, (axis, (title, bars)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
        labels = [bar.label for bar, _ in bars]
        values = [value for _, value in bars]
        axis.barh(labels, values, color=[bar.colour for bar, _ in bars], height=0.62)
        axis.set_ylim(heights[number // columns] - 0.5, -0.5)  # bars of one height in all panels
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0, labelsize=9)
        for place, value in enumerate(values):
            ratio = "" if place == 0 else f"  ({values[0] / value:.2f}x)"
            number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            axis.text(value, place, f" {number}{ratio}", va="center", fontsize=9)
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    note = f"{device}, random weights of the true size, median. Light: 8-bit weights and products, not exact."
    figure.text(0.01, 0.005, note, fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
