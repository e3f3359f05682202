"""Streaming beside others: from files to the first step, and diffusers' group offloading.

    python benchmarks/offload_peers.py [--blocks 15] [--load 3] [--peer] [--results FILE]

The step is that of offload.py; diffusers runs both branches of the guidance one after the other, as its
pipelines do. Fewer blocks than 60 take proportionally less of everything, but for what is outside of them.
"""

import argparse
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from offload_model import (
    GIB,
    Setting,
    config_of,
    guided_step,
    host_model,
    inputs_of,
    peaks,
    reset_peak,
    resident_memory,
    synchronize,
    timed,
)
from results import RESULTS, record
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module, read_component
from diffusers_qwenimage.offload import adopt, stream, unstream

Note = Callable[..., None]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=float, metavar="GIB", help="from files, with so much for weights")
    parser.add_argument("--peer", action="store_true", help="diffusers' group offloading, with a stream")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--width", type=int, default=24, help="heads of 128 dimensions (24)")
    parser.add_argument("--side", type=int, default=1328, help="side of the picture (1328)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    setting = Setting(device=device, blocks=args.blocks, width=args.width, side=args.side, repeats=1)

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        label = f"bf16, {case}" if args.blocks == 60 else f"bf16, {args.blocks} blocks, {case}"
        record("offload", label, value, unit, peak_memory_gib=peak, path=args.results)

    model = host_model(setting)
    if args.load is not None:
        measure_loading(model, setting, args.load, note)
    if args.peer:
        measure_peer(model, setting, note)


def measure_loading(model: QwenImageTransformer2DModel, setting: Setting, budget: float, note: Note) -> None:
    """From files (in the page cache) to the first step, `budget` GiB for weights; and reading the files."""
    device = setting.device
    with tempfile.TemporaryDirectory() as folder:
        write_shards(model, Path(folder))
        expected = guided_step(model, setting)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        start = time.perf_counter()
        read_files(Path(folder))
        reading = time.perf_counter() - start
        note("files", size / 1e9, "GB")
        note("reading the files once, one thread", size / reading / 1e9, "GB/s")
        config, weights = read_component(folder, "transformer")
        empty = empty_module(lambda: QwenImageTransformer2DModel.from_config(config)).to(torch.bfloat16)
        step = guided_step(empty.eval(), setting)
        before = anonymous_memory()
        with PeakMemory() as peak:
            start = time.perf_counter()
            plan = adopt(empty, weights, device=device, vram_limit=int(budget * GIB))
            note("placing the weights from files", time.perf_counter() - start, "s")
            got = step()
            synchronize(device)
            total = time.perf_counter() - start
        note(f"from files to the first step, {budget:g} GiB for weights", total, "s")
        note("the same, beside reading the files once", total / reading, "")
        note("the same, pinned", plan.pinned_bytes / GIB, "GiB")
        note("the same, most host memory of its own", peak.most - before, "GiB")
        note("the same, step", timed(step, device), "ms")
        unstream(empty, device="meta")
        adopt(empty, weights, device=device, vram_limit=int(budget * GIB), source="mapped")
        step()
        note("the same, step, weights in the mapped file", timed(step, device), "ms")
        unstream(empty, device="meta")
        stream(model, device=device, vram_limit=int(budget * GIB))
        note("the same, result equal (1 = yes)", float(torch.equal(got, expected())), "")
        unstream(model)


def write_shards(model: nn.Module, folder: Path) -> None:
    """The model in diffusers' layout, five blocks to a file."""
    model.save_config(folder)  # type: ignore[operator]
    shards: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        block = name.split(".")[1] if name.startswith("transformer_blocks.") else "0"
        shards[f"{int(block) // 5:05}"][name] = tensor
    for number, tensors in shards.items():
        save_file(tensors, folder / f"{number}.safetensors")


def read_files(folder: Path) -> None:
    """Read all weights into one buffer, over and over."""
    buffer = bytearray(2**26)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class PeakMemory:
    """The most memory of its own that the process had while this was entered, GiB."""

    def __enter__(self) -> "PeakMemory":
        self.most, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, anonymous_memory())


def anonymous_memory() -> float:
    """GiB of the process that are no pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = [
        int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))
    ]
    return sum(kilobytes) / 2**20


def measure_peer(model: QwenImageTransformer2DModel, setting: Setting, note: Note) -> None:
    """diffusers' model with its group offloading: one block per group, a stream, events of the allocator."""
    with torch.device("meta"):
        stock = diffusers.QwenImageTransformer2DModel(**config_of(setting)).to(torch.bfloat16)
    stock.pos_embed = type(stock.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)  # the other model has them now
    device = setting.device
    start = time.perf_counter()
    stock.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
        record_stream=device.type == "cuda",
    )
    note("diffusers group_offload, placing the weights", time.perf_counter() - start, "s")
    note("diffusers group_offload, host memory of the process", resident_memory(), "GiB")
    image, text, timestep, shapes = inputs_of(setting)

    @torch.no_grad()
    def step() -> Tensor:
        velocities = [
            stock(
                hidden_states=image[:1],
                encoder_hidden_states=sample[None],
                timestep=timestep[:1],
                img_shapes=shapes[:1],
                return_dict=False,
            )[0]
            for sample in text
        ]
        return torch.cat(velocities)

    reset_peak(device)
    step()
    note("diffusers group_offload, step", timed(step, device, 1), "ms", peaks(device)[0] / GIB)


if __name__ == "__main__":
    main()
