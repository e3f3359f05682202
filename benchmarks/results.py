"""Measured rows of results.csv, with what they were measured on and by which command: append, and read."""

import csv
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = (
    "date",
    "benchmark",
    "case",
    "value",
    "unit",
    "peak_memory_gib",
    "device",
    "versions",
    "command",
)


def record(
    benchmark: str,
    case: str,
    value: float,
    unit: str,
    *,
    peak_memory_gib: float | None = None,
    device: str | None = None,
    path: Path = RESULTS,
) -> None:
    """Append one row and print it.

    Args:
        benchmark: name of the script.
        case: what was measured, ours or a peer's.
        value, unit: the figure.
        peak_memory_gib: device memory, or of the process on a CPU.
        device: what it ran on; the first GPU, or the CPU, when not given.
        path: the table.
    """
    row = {
        "date": datetime.date.today().isoformat(),
        "benchmark": benchmark,
        "case": case,
        "value": f"{value:.6g}",
        "unit": unit,
        "peak_memory_gib": "" if peak_memory_gib is None else f"{peak_memory_gib:.2f}",
        "device": device or device_name(),
        "versions": versions(),
        "command": " ".join(["python", *map(shlex.quote, without_results(sys.argv))]),
    }
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    memory = f", {row['peak_memory_gib']} GiB" if row["peak_memory_gib"] else ""
    print(f"{benchmark:12s} {case:58s} {row['value']:>10s} {unit}{memory}", flush=True)


def rows_of(path: Path, device: str) -> Iterator[dict[str, str]]:
    """The rows of devices with `device` in their name, the oldest first."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from (row for row in csv.DictReader(file) if device in row["device"])


def without_results(arguments: list[str]) -> list[str]:
    """The command line without where its results go, which says nothing about them."""
    if "--results" not in arguments:
        return arguments
    place = arguments.index("--results")
    return arguments[:place] + arguments[place + 2 :]


def device_name() -> str:
    """The first GPU's name, or the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Versions of what decides the figures."""
    names = ["diffusers-qwenimage", "torch", "diffusers", "transformers"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # run from the source tree
            found.append(f"{name} source")
    return ", ".join(found)
