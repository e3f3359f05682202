"""Time of a guided step against the budget of device memory, from results.csv.

pip install matplotlib
python benchmarks/offload_plot.py [--results FILE] [--out FILE.png] [--device H100]
"""

import argparse
import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).with_name("results.csv")
OUT = Path(__file__).with_name("offload.png")
STEP = re.compile(r"(?P<weights>[\w-]+), budget (?P<budget>[\d.]+) GiB(?P<mode>, saving memory)?, step")
PEER = "bf16, diffusers group_offload, step"
COLOURS = {"bf16": "#2f6fb3", "fp8": "#7fb4e0", "int8": "#6aa84f", "fp8-storage": "#b4a7d6"}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to read")
    parser.add_argument("--out", type=Path, default=OUT, help="picture to write")
    parser.add_argument("--device", default="H100", help="rows whose device has this in its name")
    args = parser.parse_args()
    lines, peer = read(args.results, args.device)
    if not lines:
        raise SystemExit(f"{args.results} has no steps within budgets on {args.device}.")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for weights, points in lines.items():
        budgets, times = zip(*sorted(points.items()), strict=True)
        axis.plot(budgets, times, "o-", color=COLOURS.get(weights, "#888888"), label=f"ours, {weights}")
    if peer is not None:
        axis.plot(*peer, "s", color="#9aa3ad", label="diffusers group_offload, bf16")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylim(0)
    axis.set_xlabel("device memory that the process may take, GiB")
    axis.set_ylabel("guided step, 1328x1328, ms")
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)
    print(args.out)


def read(path: Path, device: str) -> tuple[dict[str, dict[float, float]], tuple[float, float] | None]:
    """Weights -> budget -> newest time; and the peer's peak memory and time."""
    lines: dict[str, dict[float, float]] = {}
    peer = None
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["benchmark"] != "offload" or device not in row["device"]:
                continue
            if found := STEP.fullmatch(row["case"]):
                lines.setdefault(found["weights"], {})[float(found["budget"])] = float(row["value"])
            elif row["case"] == PEER:
                peer = float(row["peak_memory_gib"]), float(row["value"])
    return lines, peer


if __name__ == "__main__":
    main()
