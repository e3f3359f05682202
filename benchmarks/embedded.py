"""Time and memory of `qwenimage generate` with the embedded checkpoint on this CPU, imports included.

python benchmarks/embedded.py [--repeats 3] [--results FILE]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import RESULTS, record

PROMPT = "a small red circle to the left of a big blue square on a yellow background"


def main() -> None:
    """Run the command a few times and record the median."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs (3)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "diffusers_qwenimage", "generate", PROMPT, "--seed", "0"]
        for _ in range(args.repeats):
            start = time.perf_counter()
            subprocess.run([*command, "-o", f"{folder}/out.png", "--device", "cpu"], check=True)
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    record(
        "embedded",
        "qwenimage generate, 256x256, 20 steps, guidance, from start to file",
        statistics.median(seconds),
        "s",
        peak_memory_gib=peak,
        device=f"CPU, {os.cpu_count()} cores",
        path=args.results,
    )


if __name__ == "__main__":
    main()
