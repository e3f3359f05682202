"""Time of a guided step against device memory, from results.csv: ours for budgets, and others where they are.

pip install matplotlib
python benchmarks/offload_plot.py [--results FILE] [--out FILE.png] [--device H100]
"""

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from results import RESULTS, rows_of  # noqa: E402

OUT = Path(__file__).with_name("offload.png")
STEP = re.compile(r"(?P<weights>[\w-]+), budget (?P<budget>[\d.]+) GiB(?P<mode>, saving memory)?, step")
PEERS = {
    "bf16, diffusers group_offload, step": "diffusers group_offload, bf16",
    "bf16, DiffSynth CPU offload, step": "DiffSynth CPU offload, bf16",
}
COLOURS = {"bf16": "#2f6fb3", "fp8": "#7fb4e0", "int8": "#6aa84f", "fp8-storage": "#b4a7d6"}
Point = tuple[float, float]  # GiB, ms


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to read")
    parser.add_argument("--out", type=Path, default=OUT, help="picture to write")
    parser.add_argument("--device", default="H100", help="rows whose device has this in its name")
    args = parser.parse_args()
    lines, peers = read(args.results, args.device)
    if not lines:
        raise SystemExit(f"{args.results} has no steps within budgets on {args.device}.")
    draw(lines, peers, args.out)
    print(args.out)


def read(path: Path, device: str) -> tuple[dict[str, dict[float, float]], dict[str, Point]]:
    """Weights -> budget -> newest time; and of each peer its peak memory and time."""
    lines: dict[str, dict[float, float]] = {}
    peers: dict[str, Point] = {}
    for row in rows_of(path, device):
        if row["benchmark"] != "offload":
            continue
        if found := STEP.fullmatch(row["case"]):
            lines.setdefault(found["weights"], {})[float(found["budget"])] = float(row["value"])
        elif row["case"] in PEERS:
            peers[PEERS[row["case"]]] = float(row["peak_memory_gib"]), float(row["value"])
    return lines, peers


def draw(lines: dict[str, dict[float, float]], peers: dict[str, Point], out: Path) -> None:
    """A line per kind of weights, a point per peer; both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for weights, points in lines.items():
        budgets, times = zip(*sorted(points.items()), strict=True)
        axis.plot(budgets, times, "o-", color=COLOURS.get(weights, "#888888"), label=f"ours, {weights}")
        for budget, milliseconds in points.items():
            above = weights == "bf16"
            offset, align = ((0, 6), "bottom") if above else ((0, -6), "top")
            text = f"{milliseconds:.0f}"
            axis.annotate(
                text,
                (budget, milliseconds),
                offset,
                textcoords="offset points",
                ha="center",
                va=align,
                fontsize=8,
            )
    for marker, (name, (memory, milliseconds)) in zip("sD", peers.items(), strict=False):
        axis.plot(memory, milliseconds, marker, color="#9aa3ad", label=name)
        axis.annotate(
            f"{milliseconds:.0f}",
            (memory, milliseconds),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_yticks([200, 500, 1000, 2000, 5000, 10000], minor=False)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.set_ylim(200, 20000)
    axis.set_xlabel("device memory: ours, budget of the process; others, peak (GiB)")
    axis.set_ylabel("guided step, 1328x1328, ms")
    axis.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
