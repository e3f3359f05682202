"""Streaming at the true size (60 blocks, random weights): time and memory of a guided step for budgets.

    python benchmarks/offload.py [--budgets 2 8 12 24 32] [--kind fp8 --kind-budgets 24 8 1.4]

A step is both branches of the guidance in one pass, 1328x1328, 128 and 10 text tokens, modulation tabulated.
The budget (GiB) holds for weights and activations: the process may not take more from the device
(`set_per_process_memory_fraction`). Times are of several steps in a row, so that copies for the next step are
counted. Results of all budgets are compared with the fully resident run, bit for bit. `--device cpu` with
`--blocks 4 --width 2` dry-runs everything at a small size.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from results import RESULTS, record
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module, read_component
from diffusers_qwenimage.offload import adopt, fetched_bytes, plan_stream, stream, unstream
from diffusers_qwenimage.offload.memory import HostMemory, HostSlab
from diffusers_qwenimage.quantize import quantize_
from diffusers_qwenimage.transformer import Modulation

GIB = 2**30
TEXT_TOKENS = (128, 10)
STEPS = 3  # timed together
SPARE = 350 * 2**20  # what the allocator may lose between pieces of other sizes
FRUGAL = 1.0  # GiB: below, `save_memory()`
FIRST_GUESS = 750 * 2**20  # of what a step needs beside the weights, until it was measured
Note = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and on what.

    Attributes:
        device: where the model computes.
        blocks, width: of the transformer; width in multiples of 128 (24 in the published model).
        side: of the picture in pixels.
        repeats: groups of steps that are timed.
    """

    device: torch.device
    blocks: int
    width: int
    side: int
    repeats: int


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=[2, 8, 12, 24, 32], help="GiB, in bf16")
    parser.add_argument("--kind", help="then quantise: fp8, int8 or fp8-storage")
    parser.add_argument("--kind-budgets", type=float, nargs="*", default=[24, 8, 1.4], help="GiB, then")
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[], help="numbers of slots to try at the least"
    )
    parser.add_argument("--peer", action="store_true", help="diffusers' group offloading, with a stream")
    parser.add_argument("--load", type=float, metavar="GIB", help="from files to the first step, in a budget")
    parser.add_argument("--link", action="store_true", help="rates of pinning and of the link")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--width", type=int, default=24, help="heads of 128 dimensions (24)")
    parser.add_argument("--side", type=int, default=1328, help="side of the picture (1328)")
    parser.add_argument("--repeats", type=int, default=2, help="groups of steps that are timed (2)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    setting = Setting(
        device=device,
        blocks=args.blocks,
        width=args.width,
        side=args.side,
        repeats=args.repeats,
    )
    prefix = "bf16"

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        label = f"{prefix}, {case}" if args.blocks == 60 else f"{prefix}, {args.blocks} blocks, {case}"
        record("offload", label, value, unit, peak_memory_gib=peak, path=args.results)

    if args.link:
        measure_link(device, note)
    model = host_model(setting)
    note("host memory of the process with the weights", resident_memory(), "GiB")
    if args.load is not None:
        measure_loading(model, setting, args.load, note)
    if args.peer:
        measure_peer(model, setting, note)
    if args.load is not None or args.peer:
        return
    step = guided_step(model, setting)
    if args.budgets:
        measure_budgets(model, step, setting, args.budgets, args.slots, note)
    if args.kind:
        prefix = args.kind
        quantise(model, args.kind, device, note)
        measure_budgets(model, step, setting, args.kind_budgets, args.slots, note)


def quantise(model: QwenImageTransformer2DModel, kind: str, device: torch.device, note: Note) -> None:
    """Quantise the blocks on the device; the modulation stays on the host."""
    unstream(model, device=None)
    for block in model.transformer_blocks:
        for part in (block.attn, block.img_mlp, block.txt_mlp):
            part.to(device)
    synchronize(device)
    start = time.perf_counter()
    quantize_(model, kind)
    synchronize(device)
    note("quantising on the device", time.perf_counter() - start, "s")


def measure_budgets(
    model: QwenImageTransformer2DModel,
    step: Callable[[], Tensor],
    setting: Setting,
    budgets: list[float],
    slots: list[int],
    note: Note,
) -> None:
    """Every budget; results are compared with those of the largest, where everything should be resident."""
    least = plan_stream(model, None, device=str(setting.device))
    note("smallest budget for weights, 2 slots", least.smallest_overlapping_bytes / GIB, "GiB")
    note("smallest budget for weights, 1 slot", least.smallest_bytes / GIB, "GiB")
    results: dict[str, Tensor] = {}
    beside = FIRST_GUESS
    for number in slots:
        results[f"{number} slots"], beside = measure(
            model,
            step,
            setting,
            f"nothing resident, {number} slots",
            least.smallest_bytes,
            number,
            None,
            note,
        )
    for budget in budgets:
        frugal = budget < FRUGAL
        model.save_memory(frugal)
        limit = max(int(budget * GIB) - (0 if frugal else beside + SPARE), least.smallest_bytes)
        label = f"budget {budget:g} GiB" + (", saving memory" if frugal else "")
        try:
            number = 1 if frugal else None
            limit = least.smallest_bytes if frugal else limit
            results[label], needed = measure(model, step, setting, label, limit, number, budget, note)
            beside = beside if frugal else needed
        except torch.OutOfMemoryError as error:
            print(f"{label}: {error}")
    expected = results[f"budget {max(budgets):g} GiB"]
    for label, result in results.items():
        note(f"{label}, equal to the largest (1 = yes)", float(torch.equal(result, expected)), "")
        difference = (result.float() - expected.float()).norm() / expected.float().norm()
        note(f"{label}, relative difference to the largest", float(difference), "")


def measure(
    model: QwenImageTransformer2DModel,
    step: Callable[[], Tensor],
    setting: Setting,
    label: str,
    limit: int,
    num_slots: int | None,
    budget: float | None,
    note: Note,
) -> tuple[Tensor, int]:
    """Time of a step under a limit; its result, and the bytes that it needs beside the weights."""
    device = setting.device
    if num_slots is not None:
        limit += (num_slots - 1) * plan_stream(model, limit, device=str(device), num_slots=1).slot_bytes
    empty_cache(device)
    if budget is not None and allocated(device) < budget * GIB:
        cap(device, budget)  # else the weights are on their way out of the device
    memory = resident_memory()
    start = time.perf_counter()
    on_call = ("img_mod", "txt_mod", "norm_out") if model.separate_guidance else None
    plan = stream(model, device=device, vram_limit=limit, num_slots=num_slots, on_call=on_call)
    synchronize(device)
    note(f"{label}, placing the weights", time.perf_counter() - start, "s")
    empty_cache(device)
    cap(device, budget)
    print(f"  {plan}, process {memory:.2f} -> {resident_memory():.2f} GiB")
    reset_peak(device)
    result = step()
    step()
    before = fetched_bytes(model)
    times = [timed(step, device) for _ in range(setting.repeats)]
    moved = (fetched_bytes(model) - before) / setting.repeats / STEPS
    peak, reserved = peaks(device)
    note(f"{label}, step", statistics.median(times), "ms", peak / GIB)
    note(f"{label}, reserved on the device", reserved / GIB, "GiB")
    note(f"{label}, weights on the device ({plan.num_slots} slots)", plan.device_bytes / GIB, "GiB")
    note(f"{label}, pinned", plan.pinned_bytes / GIB, "GiB")
    note(f"{label}, over the link per step", moved / 1e9, "GB")
    cap(device, None)
    return result.cpu(), peak - plan.device_bytes


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


def measure_link(device: torch.device, note: Note) -> None:
    """Rates of pinning fresh memory and of copies from it, one block's slab at a time."""
    size, memory = 453 * 10**6, HostMemory(device)
    start = time.perf_counter()
    slab = memory.slab(size)
    slab.tensor.fill_(1)
    filled = time.perf_counter()
    slab = memory.pin(slab)
    pinned = time.perf_counter()
    note("filling fresh host memory", size / (filled - start) / 1e9, "GB/s")
    note(f"pinning it ({memory.how})", size / (pinned - filled) / 1e9, "GB/s")
    target = torch.empty(size, dtype=torch.uint8, device=device)

    def copies() -> None:
        for _ in range(10):
            target.copy_(slab.tensor, non_blocking=True)

    copies()
    milliseconds = timed(copies, device, 1)
    note("copies from pinned memory", 10 * size / milliseconds / 1e6, "GB/s")


@torch.no_grad()
def host_model(setting: Setting) -> QwenImageTransformer2DModel:
    """The transformer in ordinary host memory, N(0, 0.02), norms 1: drawn on the device, block by block."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config_of(setting)).to(torch.bfloat16)
    model.pos_embed = type(model.pos_embed)((16, 56, 56))
    generator = torch.Generator(setting.device).manual_seed(0)
    staging = torch.empty(2**28, dtype=torch.uint8, pin_memory=setting.device.type == "cuda")
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device=setting.device)
            if isinstance(owner, nn.Linear):
                drawn.normal_(0, 0.02, generator=generator)
            else:
                drawn.fill_(1)
            value = on_host(drawn, staging)
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model.eval()


def on_host(drawn: Tensor, staging: Tensor) -> Tensor:
    """A copy in ordinary host memory, in large pages and through pinned memory: much faster than `.cpu()`."""
    if drawn.device.type != "cuda":
        return drawn
    value = HostSlab(drawn.nbytes, how="registered").tensor
    value.copy_(staging[: drawn.nbytes].copy_(drawn.flatten().view(torch.uint8)))
    return value.view(drawn.dtype).view(drawn.shape)


def config_of(setting: Setting) -> dict[str, Any]:
    """Of the published model, but for the size."""
    return {"num_layers": setting.blocks, "num_attention_heads": setting.width}


def inputs_of(setting: Setting) -> tuple[Tensor, list[Tensor], Tensor, list[list[tuple[int, int, int]]]]:
    """Packed latents of both branches, their texts, the timestep and the shapes."""
    grid = setting.side // 16
    generator = torch.Generator(setting.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device, dtype=torch.bfloat16, generator=generator)

    image = torch.cat([random(1, grid * grid, 64)] * 2)
    text = [random(tokens, 3584) for tokens in TEXT_TOKENS]
    timestep = torch.full((2,), 0.5, device=setting.device, dtype=torch.bfloat16)
    return image, text, timestep, [[(1, grid, grid)]] * 2


@torch.no_grad()
def guided_step(model: QwenImageTransformer2DModel, setting: Setting) -> Callable[[], Tensor]:
    """A function that computes both velocities; the modulation is drawn, since its values cost nothing."""
    image, text, timestep, shapes = inputs_of(setting)
    generator = torch.Generator(setting.device).manual_seed(2)
    six = 6 * model.inner_dim

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=setting.device, dtype=torch.bfloat16, generator=generator)
        return values * 0.1

    modulation = Modulation(image=drawn(setting.blocks, 1, six), text=drawn(setting.blocks, six))

    @torch.no_grad()
    def step() -> Tensor:
        count = 1 if model.separate_guidance else 2  # branches in one pass
        velocities: list[Tensor] = [
            model(
                hidden_states=image[first : first + count],
                encoder_hidden_states=text[first : first + count],
                timestep=timestep[first : first + count],
                img_shapes=shapes[first : first + count],
                return_dict=False,
                modulation=modulation,
            )[0]
            for first in range(0, 2, count)
        ]
        return torch.cat(velocities)

    return step


def timed(function: Callable[[], object], device: torch.device, steps: int = STEPS) -> float:
    """Milliseconds of one of several calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        function()
    synchronize(device)
    return (time.perf_counter() - start) * 1000 / steps


def cap(device: torch.device, budget: float | None) -> None:
    """Let the process take no more than `budget` GiB from the device; None: all of it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if budget is None else min(1.0, budget * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give what the allocator keeps back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Forget the peak of the device's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peaks(device: torch.device) -> tuple[int, int]:
    """Most bytes allocated, and most reserved, since the last reset."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def resident_memory() -> float:
    """GiB of host memory that the process holds."""
    return float(psutil.Process().memory_info().rss / GIB)


if __name__ == "__main__":
    main()
