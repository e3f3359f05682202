"""Comparisons in one process: what is compared is timed in turn, A B B A, so that drift meets all alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GIB = 2**30
Arms = dict[str, Callable[[], object]]
Note = Callable[..., None]


def compare(arms: Arms, repeats: int, note: Note, case: str) -> dict[str, float]:
    """Time the arms and note each one's median and spread; the medians, in milliseconds.

    Args:
        arms: what to call, by name.
        repeats: timed runs of an arm on each side of A B B A.
        note: takes a case, a value, a unit and the peak of the device's memory in GiB.
        case: what is said before the arm's name.
    """
    times, peaks = in_turn(arms, repeats)
    for name, some in times.items():
        note(f"{case}, {name}", statistics.median(some), "ms", peaks[name])
        note(f"{case}, {name}: spread, longest less shortest of {len(some)}", max(some) - min(some), "ms")
    return {name: statistics.median(some) for name, some in times.items()}


def in_turn(arms: Arms, repeats: int) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Milliseconds of every run, and peak memory, of every arm: A B C C B A after two warm-ups each."""
    for function in [*arms.values()] * 2:
        function()
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, float | None] = {}
    for name in [*arms, *reversed(arms)]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times[name] += timed(arms[name], repeats)
        peaks[name] = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
    return times, peaks


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each run, by device events; on a CPU by its clock."""
    return [_once(function)[0] for _ in range(repeats)]


def first(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one run, all that is compiled in it included, and its result."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def _once(function: Callable[[], object]) -> tuple[float, object]:
    if not torch.cuda.is_available():
        seconds, result = first(function)
        return 1e3 * seconds, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), result


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in fp32."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def allocated() -> float:
    """GiB allocated on the device now."""
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
