"""From files to the first step at true size, beside only reading the files; and the host memory it takes.

    python benchmarks/loading.py [--folder /dev/shm/model] [--vram 12] [--stream-from mapped pinned] [--rates]

What does not fit the budget streams from the mapped files at first, and is pinned from the second step on:
then steps are timed while that goes on, and afterwards. Or it stays mapped, or is pinned before anything is
computed.

The files (57 GB, random weights, written here if they are not there) lie in memory, so that what is measured
is not a disk. Reading them once is measured three times: by as many threads as loading has into memory of its
own, which is what loading must do at least; by these threads into buffers that are used again, which stay in
caches and need no new pages; and by one thread. Only bytes that a prompt needs are read: no vision tower, no
output layer, no embeddings.
"""

import argparse
import gc
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import record
from torch import Tensor
from true_model import PROMPT, add_options, write_model
from watches import HostWatch, StackWatch, own_memory

import diffusers_qwenimage.fused  # noqa: F401  # what else is imported when it is used first is no loading
import diffusers_qwenimage.kernels.vae_attention  # noqa: F401
from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.checkpoint import open_checkpoint
from diffusers_qwenimage.offload import unpinned_bytes
from diffusers_qwenimage.offload.adopt import READERS
from diffusers_qwenimage.offload.memory import HostMemory
from diffusers_qwenimage.pipelines.needs import Demand

GIB = 2**30
PIECE = 32 * 2**20  # bytes that a thread reads at a time
OWN_MEMORY = (
    16 * 10**9
)  # bytes that are read into memory of their own: pinned weights and files lie beside it
USED_AGAIN = 27 * 10**9  # bytes that are read into buffers: half of the files
ONE_THREAD = 8 * 10**9  # bytes that one thread reads
RATE_BYTES, RATE_SLABS = 2**28, 8
UNUSED = ("embed_tokens", "lm_head", "visual.")  # parts of the text encoder that prompts do not read whole
STEPS_TAKEN = 3
SOURCE_NAMES = {"default": "by default", "mapped": "mapped", "pinned": "pinned at once"}
Piece = tuple[Path, int, int]  # file, first byte, number of bytes
Note = Callable[..., None]


def main() -> None:
    """Write the model, load it, and read it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--vram", type=float, default=12.0, help="budget in GiB (12)")
    parser.add_argument("--weights", default="bf16", help="bf16, fp8, int8 (bf16)")
    parser.add_argument("--side", type=int, default=1328, help="of the picture (1328)")
    parser.add_argument(
        "--stream-from", nargs="+", choices=SOURCE_NAMES, default=["default"], help="default, mapped, pinned"
    )
    parser.add_argument("--rates", action="store_true", help="how fast host memory is filled and pinned")
    parser.add_argument("--profile", action="store_true", help="print where the time of loading goes")
    args = parser.parse_args()
    case = f"{args.weights}, budget {args.vram:g} GiB"
    if args.blocks != 60 or args.layers != 28:
        case += f", {args.blocks} blocks, {args.layers} layers"

    def note(name: str, value: float, unit: str) -> None:
        record("loading", f"{case}: {name}", value, unit, path=args.results)

    if not (args.folder / "model_index.json").is_file():
        write_model(args.folder, args.blocks, args.layers)
    try:
        reading = measure_reading(args.folder, note)
        for index, source in enumerate(args.stream_from):
            name = SOURCE_NAMES[source] + (", kernels compiled before" if index else "")
            total = measure_loading(args, source, partial(note_of, note, name))
            for way, seconds in reading.items():
                note(f"{name}, files to first step, beside reading {way}", total / seconds, "")
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    if args.rates:
        measure_rates(torch.device(args.device), note)


def note_of(note: Note, group: str, name: str, value: float, unit: str) -> None:
    """Record a row of a group."""
    note(f"{group}, {name}", value, unit)


def measure_loading(args: argparse.Namespace, source: str, note: Note) -> float:
    """From files to the first step, and how it goes on; returns the seconds to the first step."""
    if args.device == "cuda":
        torch.cuda.mem_get_info()  # CUDA's own start
    before = own_memory()
    with HostWatch() as host:
        with StackWatch() as profile:
            start = time.perf_counter()
            pipe = load(args, source)
            loaded = time.perf_counter()
            first = take_steps(pipe, args, num_steps=args.steps if source == "default" else STEPS_TAKEN)
        note("loading", loaded - start, "s")
        note("encoding both prompts, for the first time", first.began - loaded, "s")
        note("tabulating the modulation and the first step", first.ends[0] - first.began, "s")
        note("from files to the end of the first step", first.ends[0] - start, "s")
        if source == "default":
            note_pinning(pipe, first, note)
        else:
            note("a later step", first.ends[-1] - first.ends[-2], "s")
        if args.profile:
            print("\n".join(profile.lines(60)), file=sys.stderr, flush=True)
        pipe.clear_prompt_cache()
        begin = time.perf_counter()
        again = take_steps(pipe, args, num_steps=STEPS_TAKEN)
    note("encoding both prompts", again.began - begin, "s")
    note("tabulating the modulation and a step", again.ends[0] - again.began, "s")
    note("a step after that", median(again.seconds), "s")
    note("steps that equal those before, bit for bit", again.equal_steps(first), f"of {STEPS_TAKEN}")
    report = pipe.memory_report()
    print(report, file=sys.stderr, flush=True)
    note("pinned", report.pinned / GIB, "GiB")
    note(
        "most host memory of its own, beside what is pinned",
        (host.most - before - report.pinned) / GIB,
        "GiB",
    )
    pipe.disable_vram_management("meta")
    del pipe
    gc.collect()
    return first.ends[0] - start


def load(args: argparse.Namespace, source: str) -> Any:
    """The pipeline, placed for one picture."""
    tokens = args.side // 16
    pipe = QwenImagePipeline.from_pretrained_in_place(
        str(args.folder),
        vram_limit=args.vram,
        weights=args.weights,
        stream_from=None if source == "default" else source,
        device=args.device,
        demand=Demand(rows=tokens, columns=tokens, steps=args.steps),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def note_pinning(pipe: Any, taken: "Steps", note: Note) -> None:
    """Record the steps beside which weights were pinned, and wait for the rest."""
    beside = [
        seconds
        for seconds, left, left_after in zip(taken.seconds, taken.unpinned, taken.unpinned[1:], strict=False)
        if left_after < left
    ]
    total = taken.unpinned[0]
    rows = zip(taken.seconds, taken.unpinned[1:], strict=True)
    print("step (s): left to pin (GiB)", *(f"{s:.2f}: {n / GIB:.1f}" for s, n in rows), file=sys.stderr)
    if beside:
        note("a step while weights are pinned", median(beside), "s")
        note("the longest of these", max(beside), "s")
        note("pinned beside one step", (total - taken.unpinned[-1]) / len(beside) / GIB, "GiB")
    if 0 in taken.unpinned:
        done = taken.unpinned.index(0)
        note("all pinned after the first step by", taken.ends[done] - taken.ends[0], "s")
        return
    begin, left = time.perf_counter(), unpinned(pipe)
    pipe.finish_pinning()
    note("waiting for the rest of it", time.perf_counter() - begin, "s")
    note("the rest", left / GIB, "GiB")


@dataclass(kw_only=True)
class Steps:
    """Some steps of one picture.

    Attributes:
        began: when the prompts were encoded.
        ends: when each step was done.
        unpinned: bytes that were still to be pinned then.
        latents: after each of the first steps.
    """

    began: float
    ends: list[float] = field(default_factory=list)
    unpinned: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each step but the first, which also tabulates the modulation."""
        return [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)]

    def equal_steps(self, other: "Steps") -> int:
        """How many of the first steps gave the same latents, bit for bit."""
        return sum(map(torch.equal, self.latents, other.latents))


def take_steps(pipe: Any, args: argparse.Namespace, *, num_steps: int) -> Steps:
    """Encode the prompts and take the first steps of a picture; once all is pinned, three more are enough."""
    pipe.encode_prompt(PROMPT)
    pipe.encode_prompt(" ")
    wait(args.device)
    steps = Steps(began=time.perf_counter())

    def stamp(pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        wait(args.device)
        steps.ends.append(time.perf_counter())
        steps.unpinned.append(unpinned(pipe))
        if index < STEPS_TAKEN:
            steps.latents.append(tensors["latents"].clone())
        enough = index + 1 > STEPS_TAKEN and not any(steps.unpinned[-STEPS_TAKEN:])
        pipeline._interrupt = index + 1 == num_steps or enough
        return {}

    pipe(
        PROMPT,
        negative_prompt=" ",
        height=args.side,
        width=args.side,
        num_inference_steps=args.steps,
        seed=0,
        output_type="latent",
        callback_on_step_end=stamp,
        callback_on_step_end_tensor_inputs=["latents"],
    )
    return steps


def unpinned(pipe: Any) -> int:
    """Bytes that stream from files until they are pinned."""
    return unpinned_bytes(pipe.transformer) + unpinned_bytes(pipe.text_encoder)


def measure_reading(folder: Path, note: Note) -> dict[str, float]:
    """Seconds of reading what a prompt needs, and nothing else, in different ways."""
    pieces = pieces_of(folder)
    size = sum(piece[2] for piece in pieces)
    note("bytes of the files that are needed", size / 1e9, "GB")
    seconds = {}
    for way, threads, own, limit in (
        (f"by {READERS} threads into memory of its own", READERS, True, OWN_MEMORY),
        (f"by {READERS} threads into buffers used again", READERS, False, USED_AGAIN),
        ("by one thread", 1, False, ONE_THREAD),
    ):
        read = first(pieces, limit)
        rate = sum(piece[2] for piece in read) / seconds_of_reading(read, threads, own=own)
        note(f"reading {way}", rate / 1e9, "GB/s")
        seconds[way] = size / rate
    return seconds


def pieces_of(folder: Path) -> list[Piece]:
    """Every byte of weights that a prompt needs, in pieces."""
    pieces = []
    for name in ("transformer", "text_encoder", "vae"):
        for key, stored in open_checkpoint(folder / name).tensors.items():
            if not any(part in key for part in UNUSED):
                end = stored.offset + stored.entry.end - stored.entry.start
                starts = range(stored.offset, end, PIECE)
                pieces += [(stored.file, start, min(PIECE, end - start)) for start in starts]
    return pieces


def first(pieces: Sequence[Piece], limit: int) -> list[Piece]:
    """As many of the first pieces as do not exceed `limit` bytes."""
    chosen: list[Piece] = []
    for piece in pieces:
        limit -= piece[2]
        if limit < 0:
            break
        chosen.append(piece)
    return chosen


def seconds_of_reading(pieces: Sequence[Piece], threads: int, *, own: bool) -> float:
    """Read pieces of files into memory of their own, or over and over into one buffer per thread."""
    local = threading.local()
    memory = torch.empty(sum(piece[2] for piece in pieces) if own else 0, dtype=torch.uint8)
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += piece[2]

    def read(piece: Piece, start: int) -> None:
        path, offset, size = piece
        if own:
            target = memory[start : start + size]
        else:
            if not hasattr(local, "buffer"):
                local.buffer = torch.empty(PIECE, dtype=torch.uint8)
            target = local.buffer[:size]
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            assert file.readinto(memoryview(target.numpy())) == size

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, pieces, starts))
    return time.perf_counter() - begin


def measure_rates(device: torch.device, note: Note) -> None:
    """How fast new memory is written for the first time, and how fast it is pinned then."""
    for threads in (1, READERS):
        memory = HostMemory(device)
        slabs = [memory.slab(RATE_BYTES) for _ in range(RATE_SLABS)]
        with ThreadPoolExecutor(threads) as pool:
            for name, work in (
                ("writing new memory", lambda slab: slab.tensor.numpy().fill(1)),
                ("pinning it", memory.pin),
            ):
                begin = time.perf_counter()
                list(pool.map(work, slabs))
                rate = RATE_BYTES * RATE_SLABS / (time.perf_counter() - begin)
                note(f"{name}, {threads} thread(s)", rate / 1e9, "GB/s")


def wait(device: str) -> None:
    """Until the device has done all that was given to it."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
