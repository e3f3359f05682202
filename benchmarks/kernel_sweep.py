"""What was chosen by timing, timed again: how the blocks are put together, and the kernels' programs.

    python benchmarks/kernels.py --sweep

A large GPU at work is limited by its power: what is quicker alone is not always quicker in a forward. So each
choice runs for a while, in turn with the others, and its clock and power are noted.
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffusers_qwenimage import QwenImageTransformer2DModel, fused
from diffusers_qwenimage.block_boundary import Handover
from diffusers_qwenimage.kernels import norm, rope, set_backend

WIDTH, HEADS, TEXT, BLOCKS = 3072, 24, 128, 12
COPIES = 4  # of inputs, so that none is in a cache
DTYPE = torch.bfloat16
DEVICE = "cuda"
GRIDS = (83, 64)  # rows and columns of tokens of 1328x1328 and 1024x1024
Run = Callable[[], object]


def sweep(cases: list[str]) -> None:
    """The cases of these names; all if there is none."""
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, {properties.multi_processor_count} processors", flush=True)
    set_backend("auto")
    failed = []
    with torch.no_grad():
        for name, function in SWEEPS.items():
            if name in (cases or SWEEPS):
                start = time.perf_counter()
                try:
                    function()
                except Exception:  # the other cases are still wanted; the exit code tells
                    traceback.print_exc()
                    failed.append(name)
                print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
    if failed:
        raise SystemExit(f"Failed, see above: {', '.join(failed)}")


def sweep_forward() -> None:
    """A forward of some blocks, put together in other ways."""
    model, table = build()
    for grid in GRIDS:
        inputs = {
            "hidden_states": random(1, grid * grid, 64),
            "encoder_hidden_states": random(1, TEXT, 3584),
            "timestep": torch.full((1,), 0.5, device=DEVICE, dtype=DTYPE),
            "img_shapes": [[(1, grid, grid)]],
            "return_dict": False,
            "modulation": table.at(0),
        }

        def call(inputs: dict[str, Any] = inputs) -> Tensor:
            result: Tensor = model(**inputs)[0]
            return result

        for _ in range(2):  # the second hands over
            call()
        no_text = Choice(make=Nothing, is_text=True)
        arms: dict[str, Run] = {
            "as it is": call,
            "nothing handed over": having(Handover, {"begin": lambda *rest: None}, call),
            "text in turn": having(fused, {"text_beside_image": False}, call),
            "as a graph": recorded(call),
            "no text products": choosing(model, no_text, call),
        }
        in_rounds(f"{BLOCKS} blocks, {grid}x{grid} tokens", arms, seconds=0.1, rounds=3)
        timeline(call)


def sweep_attention() -> None:
    """Attention on views of the joint buffer, and on tensors of other layouts."""
    for tokens in (grid * grid + TEXT for grid in GRIDS):
        joint = random(1, tokens, 3, HEADS, WIDTH // HEADS)
        views = [part.transpose(1, 2) for part in joint.unbind(2)]
        by_token = [part.contiguous().transpose(1, 2) for part in joint.unbind(2)]
        by_head = [part.transpose(1, 2).contiguous() for part in joint.unbind(2)]
        arms: dict[str, Run] = {
            "joint buffer": partial(scaled_dot_product_attention, *views),
            "by token": partial(scaled_dot_product_attention, *by_token),
            "by head": partial(scaled_dot_product_attention, *by_head),
            "values in the joint buffer": partial(scaled_dot_product_attention, *by_token[:2], views[2]),
        }
        in_rounds(f"attention, {tokens}", arms, seconds=0.04, flop=4 * tokens * tokens * WIDTH)


def sweep_norm() -> None:
    """Programs and warps of gate, norm and modulation."""
    modulation = random(1, 6 * WIDTH)
    for tokens in (grid * grid for grid in GRIDS):
        streams = [(random(tokens, WIDTH), random(tokens, WIDTH)) for _ in range(COPIES)]
        operations: dict[str, tuple[Callable[[Tensor, Tensor], object], int]] = {
            "norm": (lambda x, y: norm.attention_norm(x, modulation, None, None, True), 2),
            "gate + norm": (lambda x, y: norm.mlp_norm(x, y, modulation, None, None, True), 4),
            "gate": (lambda x, y: norm.mlp_add(x, y, modulation, None, True), 3),
        }
        for name, (operation, passes) in operations.items():
            arms = {}
            for warps, programs in product((4, 8), (4, 8, 12, tokens)):
                settings = {"_num_warps": lambda block, n=warps: n, "_PROGRAMS": programs}
                each = [partial(operation, *stream) for stream in streams]
                arms[f"{warps} warps, {programs} programs"] = recorded(having(norm, settings, in_turn(each)))
            in_rounds(
                f"{name}, {tokens}", arms, seconds=0.004, calls=COPIES, moved=2 * passes * tokens * WIDTH
            )


def sweep_rope() -> None:
    """Heads and warps of a program of norm and rotation."""
    dim = WIDTH // HEADS
    weight = torch.ones(dim, device=DEVICE, dtype=DTYPE)
    for tokens in (grid * grid for grid in GRIDS):
        joints = [random(tokens + TEXT, 3, HEADS, dim) for _ in range(COPIES)]
        table = torch.rand(tokens, dim // 2, 2, device=DEVICE)
        rows = torch.arange(TEXT, tokens + TEXT, device=DEVICE, dtype=torch.int32)
        each = [partial(rope.norm_rotate_into, joint, rows, weight, weight, table) for joint in joints]
        arms = {}
        for heads, warps in ((4, 1), (8, 1), (16, 1), (16, 2), (16, 4)):
            settings = {"_tile": lambda *sizes, n=heads: (dim, n), "_WARPS": warps}
            arms[f"{heads} heads, {warps} warps"] = recorded(having(rope, settings, in_turn(each)))
        in_rounds(f"norm + rotation, {tokens}", arms, seconds=0.004, calls=COPIES, moved=8 * tokens * WIDTH)


SWEEPS: dict[str, Callable[[], None]] = {
    "forward": sweep_forward,
    "attention": sweep_attention,
    "norm": sweep_norm,
    "rope": sweep_rope,
}


def build() -> tuple[QwenImageTransformer2DModel, Any]:
    """A transformer of some blocks at true width with random weights, and its modulation."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=BLOCKS).to(DTYPE)
    model.to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02)
    model.eval().requires_grad_(False)
    sigma = torch.full((1,), 0.5, device=DEVICE, dtype=DTYPE)
    return model, model.tabulate_modulation(sigma, dtype=DTYPE)


class Nothing:
    """In the place of layers: what is computed is wrong, and takes less time."""

    target = None

    def __init__(self, layers: list[Any]) -> None:
        pass

    def into(self, out: Tensor, x: Tensor) -> None:
        out.zero_()

    def __call__(self, x: Tensor, dtype: torch.dtype, *, triton: bool = True) -> Tensor:
        return x


class Choice(NamedTuple):
    """What computes the layers of one stream."""

    make: Callable[[list[Any]], Any]
    is_text: bool


def choosing(model: Any, choice: Choice, call: Run) -> Run:
    """The call with the layers of one stream computed by something else."""
    names = [f"{'text' if choice.is_text else 'image'}_{part}" for part in ("qkv", "out", "mlp")]
    made = []
    for block in model.transformer_blocks:
        attn, mlp = block.attn, block.txt_mlp if choice.is_text else block.img_mlp
        qkv, out = [attn.to_q, attn.to_k, attn.to_v], attn.to_out[0]
        if choice.is_text:
            qkv, out = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], attn.to_add_out
        made.append([choice.make(layers) for layers in (qkv, [out], [mlp.net[0].proj, mlp.net[2]])])

    def run() -> object:
        plans = [block.plan for block in model.transformer_blocks]
        kept = [[getattr(plan, name) for name in names] for plan in plans]
        try:
            _set(plans, names, made)
            return call()
        finally:
            _set(plans, names, kept)

    return run


def _set(plans: list[Any], names: list[str], values: list[list[Any]]) -> None:
    for plan, parts in zip(plans, values, strict=True):
        for name, part in zip(names, parts, strict=True):
            setattr(plan, name, part)


def having(owner: Any, settings: dict[str, object], call: Run) -> Run:
    """The call while these attributes have these values."""

    def run() -> object:
        before = {name: getattr(owner, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(owner, name, value)
            return call()
        finally:
            for name, value in before.items():
                setattr(owner, name, value)

    return run


def random(*shape: int) -> Tensor:
    """N(0, 1)."""
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def in_turn(calls: list[Run]) -> Run:
    """All of them, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def recorded(call: Run) -> Run:
    """The call as a CUDA graph."""
    call()  # compiles
    if DEVICE != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_rounds(
    title: str,
    arms: dict[str, Run],
    *,
    seconds: float,
    rounds: int = 2,
    calls: int = 1,
    flop: float = 0,
    moved: int = 0,
) -> None:
    """Run each arm for so long, in rounds of A B B A, and print microseconds of one of its calls."""
    times: dict[str, list[float]] = {label: [] for label in arms}
    states: dict[str, list[tuple[float, float]]] = {label: [] for label in arms}
    number = {label: max(1, int(1e6 * seconds / several(run, 2))) for label, run in arms.items()}
    for label in [*arms, *reversed(arms)] * rounds:
        times[label].append(several(arms[label], number[label], states[label]) / calls)
    for label, values in times.items():
        rate = f", {flop / statistics.median(values) / 1e6:.0f} TFLOP/s" if flop else ""
        rate += f", {moved / statistics.median(values) / 1e6:.2f} TB/s" if moved else ""
        state = ""
        if states[label]:
            clock, power = (statistics.mean(part) for part in zip(*states[label], strict=True))
            state = f", {clock:.0f} MHz, {power:.0f} W"
        figures = " ".join(f"{value:.1f}" for value in values)
        print(f"{title} | {statistics.median(values):.1f} us ({figures}){rate}{state} | {label}", flush=True)


def several(run: Run, number: int, states: list[tuple[float, float]] | None = None) -> float:
    """Microseconds of a call among so many; adds MHz and watts while they run to `states`."""
    if DEVICE != "cuda":
        run()
        return 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        run()
    end.record()
    while states is not None and not end.query():
        states.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000))
    end.synchronize()
    return 1000 * start.elapsed_time(end) / number


def timeline(call: Run) -> None:
    """Print what a block in the middle launches, from attention to attention: begin, microseconds, place."""
    if DEVICE != "cuda":
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    wanted = [event for event in events if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")]
    wanted.sort(key=lambda event: event["ts"])
    attentions = [index for index, event in enumerate(wanted) if "sdpa" in event["name"]]
    first, last = attentions[BLOCKS // 2 - 1 : BLOCKS // 2 + 1]
    for event in wanted[first : last + 1]:
        begin, details = event["ts"] - wanted[first]["ts"], event["args"]
        grid = "x".join(map(str, details.get("grid", [])))
        print(f"{begin:8.1f} {event['dur']:7.1f} stream {details.get('stream')} {grid} {event['name'][:70]}")
