"""A whole picture at true size within a budget, from files to pixels, text encoder and VAE included.

    python benchmarks/whole_image.py [--folder /dev/shm/model] [--vram 8 12] [--weights bf16 fp8]

Random weights of the true sizes are written once, in shards (57 GB; the same block again and again). Each
case runs in a process of its own that may not take more device memory than its budget, so that the peak is
that of everything: loading, prompt, denoising, decoding. `--blocks` and `--layers` make smaller models.
"""

import argparse
import json
import math
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, record
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_qwenimage import AutoencoderKLQwenImage, QwenImageTransformer2DModel, default_checkpoint
from diffusers_qwenimage.checkpoint import empty_module, weight_files
from diffusers_qwenimage.files import write_text
from diffusers_qwenimage.loading import load_scheduler

GIB = 2**30
FOLDER = Path("/dev/shm/qwen-image-random")
SHARD_BYTES = 2 * 10**9
WRITERS = 16
READERS = 8
READ_BYTES = 64 * 2**20
RANDOM_VALUES = 2**24 + 3  # odd, so that rows of a matrix differ
TEXT_CONFIG = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1_000_000.0,
}
VISION_CONFIG = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "depth": 32,
    "num_heads": 16,
}
TIMES = ("loading", "first step since loading began", "step", "decoding", "whole picture", "second picture")
TOLD = "told: "
PROMPT = "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating."


def main() -> None:
    """Write the model, then run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the model")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    parser.add_argument("--blocks", type=int, default=60, help="of the transformer (60)")
    parser.add_argument("--layers", type=int, default=28, help="of the text encoder (28)")
    parser.add_argument("--tiny", action="store_true", help="use the embedded checkpoint instead")
    parser.add_argument("--vram", type=float, nargs="+", default=[8.0, 12.0], help="budgets in GiB (8 12)")
    parser.add_argument("--weights", nargs="+", default=["bf16"], help="bf16, fp8, int8 (bf16)")
    parser.add_argument("--side", type=int, default=1024, help="of the picture (1024)")
    parser.add_argument("--steps", type=int, default=20, help="(20)")
    parser.add_argument("--device", default="cuda", help="(cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
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
        seconds, size = read_once(folder)
        note(args, f"reading all {size / 1e9:.1f} GB of files once, {READERS} threads", seconds, "s")
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


def note(args: argparse.Namespace, case: str, value: float, unit: str, peak: float | None = None) -> None:
    """Record a row."""
    record("whole_image", case, value, unit, peak_memory_gib=peak, path=args.results)


def draw(args: argparse.Namespace, tell: Callable[[str, float], None]) -> None:
    """Load, draw, and tell what it took, in seconds and bytes, as soon as it is known."""
    from diffusers_qwenimage import QwenImagePipeline
    from diffusers_qwenimage.pipelines.needs import Demand

    device, vram = torch.device(args.device), args.vram[0]
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        before = total - free  # the context of this process, and other processes
        torch.cuda.set_per_process_memory_fraction(min(1.0, vram * GIB / total))
    host = HostWatch()
    start = time.perf_counter()
    weights = args.weights[0]
    tokens = args.side // 16
    pipe = QwenImagePipeline.from_pretrained_in_place(
        str(args.folder),
        vram_limit=vram,
        weights=weights,
        device=args.device,
        demand=Demand(rows=tokens, columns=tokens, steps=args.steps),
    )
    tell("loading", time.perf_counter() - start)
    print(pipe.memory_report(), file=sys.stderr, flush=True)
    times: list[float] = []

    def stamp(_: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if len(times) == 1:
            tell("first step since loading began", times[0] - start)
        return {}

    def call(seed: int) -> float:
        image = pipe(
            PROMPT,
            negative_prompt=" ",
            height=args.side,
            width=args.side,
            num_inference_steps=args.steps,
            seed=seed,
            callback_on_step_end=stamp,
            callback_on_step_end_tensor_inputs=[],
        ).images[0]
        assert image.size == (args.side, args.side)
        return time.perf_counter()

    begin = time.perf_counter()
    end = call(0)
    tell("step", (times[-1] - times[0]) / max(len(times) - 1, 1))
    tell("decoding", end - times[-1])
    tell("whole picture", end - begin)
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        tell("peak, reserved by the allocator", torch.cuda.max_memory_reserved())
        tell("peak, allocated", torch.cuda.max_memory_allocated())
        tell("taken on the device afterwards, beside the context", total - free - before)
    tell("peak of host memory, anonymous", host.stop())
    tell(
        "peak of host memory, mapped files included",
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    tell("pinned", pipe.memory_report().pinned)
    if args.second:
        begin = time.perf_counter()
        tell("second picture", call(1) - begin)
    print(pipe.memory_report(), file=sys.stderr, flush=True)


class HostWatch:
    """The highest anonymous memory of this process; mapped files, whose pages the system can drop, aside."""

    def __init__(self) -> None:
        self._peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes."""
        self._end.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._peak = max(self._peak, 1024 * int(line.split()[1]))


def read_once(folder: Path) -> tuple[float, int]:
    """Seconds for reading all weight files into memory that is used again, and their bytes."""
    files = [file for name in ("transformer", "text_encoder", "vae") for file in weight_files(folder / name)]
    ranges = [(file, offset) for file in files for offset in range(0, file.stat().st_size, READ_BYTES)]
    local = threading.local()

    def read(part: tuple[Path, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(READ_BYTES)
        file, offset = part
        with file.open("rb", buffering=0) as opened:
            opened.seek(offset)
            return opened.readinto(local.buffer) or 0

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        size = sum(pool.map(read, ranges))
    return time.perf_counter() - start, size


def write_model(folder: Path, blocks: int, layers: int) -> None:
    """A model in diffusers' layout, of random weights N(0, 0.02), norms 1; all blocks are alike."""
    transformer = empty_module(lambda: QwenImageTransformer2DModel(num_layers=blocks))
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "num_hidden_layers": layers}, vision_config=VISION_CONFIG
    )
    text_encoder = empty_module(lambda: Qwen2_5_VLForConditionalGeneration(config))
    vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    largest = max(math.prod(p.shape) for part in (transformer, text_encoder) for p in part.parameters())
    values = random_bytes(largest)
    for part in ("transformer", "text_encoder"):
        (folder / part).mkdir(parents=True)
    transformer.save_config(folder / "transformer")
    config.save_pretrained(folder / "text_encoder")
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [
            *write_shards(
                pool, folder / "transformer", "diffusion_pytorch_model", shapes(transformer), values
            ),
            *write_shards(pool, folder / "text_encoder", "model", shapes(text_encoder), values),
        ]
        wait(jobs)
    vae.save_pretrained(folder / "vae")
    load_scheduler().save_pretrained(folder / "scheduler")
    for part in ("tokenizer", "model_index.json"):
        source = default_checkpoint() / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / part)


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a state dict."""
    return {key: tuple(value.shape) for key, value in module.state_dict(keep_vars=True).items()}


def write_shards(
    pool: ThreadPoolExecutor,
    folder: Path,
    stem: str,
    sizes: Mapping[str, tuple[int, ...]],
    values: memoryview,
) -> list[Future[None]]:
    """Write tensors of these shapes, bf16, straight from memory that all of them share."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in sizes.items():
        num_bytes = 2 * math.prod(shape)
        if size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    ones = ones_bytes()

    def write(name: str, keys: Sequence[str]) -> None:
        with (folder / name).open("wb", buffering=0) as file:
            file.write(header(keys, sizes))
            for key in keys:
                source = ones if is_norm(key, sizes[key]) else values
                view = source[: 2 * math.prod(sizes[key])]
                while view:
                    view = view[file.write(view) :]

    index = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    content = json.dumps({"metadata": {}, "weight_map": index})
    write_text(folder / f"{stem}.safetensors.index.json", content)
    return [pool.submit(write, name, keys) for name, keys in zip(names, shards, strict=True)]


def header(keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file with these tensors in order."""
    entries, end = {}, 0
    for key in keys:
        start, end = end, end + 2 * math.prod(shapes[key])
        entries[key] = {"dtype": "BF16", "shape": list(shapes[key]), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def wait(jobs: Iterable[Any]) -> None:
    """Until all are done; raises what one of them raised."""
    for job in list(jobs):
        job.result()


def random_bytes(num_elements: int) -> memoryview:
    """N(0, 0.02) in bf16: so many values, repeating themselves."""
    drawn = torch.randn(RANDOM_VALUES, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    repeated = drawn.repeat(-(-num_elements // RANDOM_VALUES))[:num_elements]
    return memoryview(repeated.view(torch.uint8).numpy()).cast("B")


def ones_bytes() -> memoryview:
    """Ones in bf16, for norms."""
    return memoryview(torch.ones(1 << 16, dtype=torch.bfloat16).view(torch.uint8).numpy()).cast("B")


def is_norm(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor scales what is normalised."""
    return len(shape) == 1 and key.endswith("weight")


if __name__ == "__main__":
    main()
