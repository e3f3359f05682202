"""A whole picture at true size within a budget, from files to pixels, text encoder and VAE included.

    python benchmarks/whole_image.py [--folder /dev/shm/model] [--vram 8 12] [--weights bf16 fp8]

Random weights of the true sizes are written once, in shards (57 GB; the same block again and again). Each
case runs in a process of its own (`--inline`: in this one), whose allocator may not take more device memory
than its budget leaves beside what CUDA will have at the end (pipelines/context.py). The most in use is what
the driver says of the whole device, from the start of the process to the picture, looked at every 10 ms:
loading, prompt, denoising, decoding. Budgets are in GiB: 7.45 are 8 GB. `--blocks` and `--layers` make
smaller models.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import record
from torch import Tensor
from true_model import PROMPT, add_options, write_model
from watches import DeviceWatch, HostWatch

from diffusers_qwenimage import default_checkpoint
from diffusers_qwenimage.pipelines.context import context_bytes, expected_context_bytes

GIB = 2**30
TIMES = ("loading", "first step since loading began", "step", "decoding", "whole picture", "second picture")
GIGABYTES = "most in use on the device, CUDA and others included"  # in the unit of the goal too
TOLD = "told: "
Tell = Callable[[str, float], None]


def main() -> None:
    """Write the model, then run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--tiny", action="store_true", help="use the embedded checkpoint instead")
    parser.add_argument("--vram", type=float, nargs="+", default=[8.0, 12.0], help="budgets in GiB (8 12)")
    parser.add_argument("--weights", nargs="+", default=["bf16"], help="bf16, fp8, int8 (bf16)")
    parser.add_argument("--side", type=int, default=1024, help="of the picture (1024)")
    parser.add_argument("--second", action="store_true", help="draw a second picture too")
    parser.add_argument("--inline", action="store_true", help="one case, without a process of its own")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        draw(args, lambda *told: print(TOLD + json.dumps(told), flush=True))
        return
    folder = default_checkpoint() if args.tiny else args.folder
    if not args.tiny and not (folder / "model_index.json").is_file():
        start = time.perf_counter()
        write_model(folder, args.blocks, args.layers)
        print(f"model written in {time.perf_counter() - start:.1f} s", flush=True)
    try:
        for weights in args.weights:
            for vram in args.vram:
                measure(args, folder, vram, weights)
    finally:
        if not args.keep and not args.tiny:
            shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path, vram: float, weights: str) -> None:
    """One case in a process of its own."""
    options = {
        "--folder": folder,
        "--side": args.side,
        "--steps": args.steps,
        "--device": args.device,
        "--vram": vram,
        "--weights": weights,
        "--worker": "yes",
    }
    command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
    if args.second:
        command.append("--second")
    case = f"{args.side}x{args.side}, {args.steps} steps, {weights}, budget {vram:g} GiB"

    def tell(name: str, value: float) -> None:
        unit = "s" if name in TIMES else "GiB"
        note(args, f"{case}: {name}", value if unit == "s" else value / GIB, unit)
        if name == GIGABYTES:
            note(args, f"{case}: {name}", value / 1e9, "GB")

    if args.inline:
        args.folder, args.vram, args.weights = folder, [vram], [weights]
        draw(args, tell)
        return
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr[-4000:], flush=True)
    for line in done.stdout.splitlines():
        if line.startswith(TOLD):
            tell(*json.loads(line.removeprefix(TOLD)))
    if done.returncode != 0:
        print(f"{case}: failed with {done.returncode}", flush=True)


def note(args: argparse.Namespace, case: str, value: float, unit: str) -> None:
    """Record a row."""
    record("whole_image", case, value, unit, path=args.results)


def draw(args: argparse.Namespace, tell: Tell) -> None:
    """Load, draw, and tell what it took, in seconds and bytes, as soon as it is known."""
    begin, memory, host = time.perf_counter(), DeviceMemory(args.device, tell), HostWatch()
    with host, memory:
        memory.cap(args.vram[0])
        pipe = load_and_draw(args, tell, memory, begin)
    tell("peak of host memory of its own", host.most)
    tell("pinned", pipe.memory_report().pinned)
    if args.second:
        begin = time.perf_counter()
        call(pipe, args, 1, lambda index: None)
        tell("second picture", time.perf_counter() - begin)
    print(pipe.memory_report(), file=sys.stderr, flush=True)


class DeviceMemory:
    """What is in use on a GPU, moment by moment; nothing on a CPU."""

    def __init__(self, device: str, tell: Tell) -> None:
        self._device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._watch = DeviceWatch()
        self._tell = tell

    def __enter__(self) -> "DeviceMemory":
        if self._on_gpu:
            self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._on_gpu:
            self._watch.__exit__(*error)
            self._tell(GIGABYTES, self._watch.most)
            self._tell("peak, reserved by the allocator", torch.cuda.max_memory_reserved())
            self._tell("peak, allocated", torch.cuda.max_memory_allocated())

    def cap(self, vram: float) -> None:
        """Let the allocator take no more than `vram` GiB less what CUDA itself will have."""
        if self._on_gpu:
            before = context_bytes(self._device)
            allowed = vram * GIB - expected_context_bytes(self._device)
            total = torch.cuda.get_device_properties(self._device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
            self._tell("CUDA's own, at first", before)
            self._tell("CUDA's own, with libraries", context_bytes(self._device))
            self._tell("the allocator's limit", allowed)

    def moment(self, name: str) -> None:
        """Tell of what was done since the last moment."""
        if self._on_gpu:
            self._watch.look()
            self._tell(f"most in use on the device, {name}", self._watch.most_lately())
            self._tell(f"CUDA's own, after {name}", context_bytes(self._device))


def load_and_draw(args: argparse.Namespace, tell: Tell, memory: DeviceMemory, start: float) -> Any:
    """The pipeline, which has drawn a picture; `start`: when the clock began."""
    from diffusers_qwenimage import QwenImagePipeline
    from diffusers_qwenimage.pipelines.needs import Demand

    tokens = args.side // 16
    pipe = QwenImagePipeline.from_pretrained_in_place(
        str(args.folder),
        vram_limit=args.vram[0],
        weights=args.weights[0],
        device=args.device,
        demand=Demand(rows=tokens, columns=tokens, steps=args.steps),
    )
    tell("loading", time.perf_counter() - start)
    memory.moment("loading")
    print(pipe.memory_report(), file=sys.stderr, flush=True)
    begin, times = time.perf_counter(), list[float]()

    def stamp(index: int) -> None:
        times.append(time.perf_counter())
        if index == 0:
            memory.moment("prompt and first step")
        elif index == args.steps - 1:
            memory.moment("steps")

    call(pipe, args, 0, stamp)
    end = time.perf_counter()
    memory.moment("decoding")
    tell("first step since loading began", times[0] - start)
    tell("step", (times[-1] - times[0]) / max(len(times) - 1, 1))
    tell("decoding", end - times[-1])
    tell("whole picture", end - begin)
    return pipe


def call(pipe: Any, args: argparse.Namespace, seed: int, after_step: Callable[[int], None]) -> None:
    """Draw a picture."""

    def stepped(_: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        after_step(index)
        return {}

    image = pipe(
        PROMPT,
        negative_prompt=" ",
        height=args.side,
        width=args.side,
        num_inference_steps=args.steps,
        seed=seed,
        callback_on_step_end=stepped,
        callback_on_step_end_tensor_inputs=[],
    ).images[0]
    assert image.size == (args.side, args.side)


if __name__ == "__main__":
    main()
