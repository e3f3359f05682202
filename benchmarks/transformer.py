"""The transformer at its true size (60 blocks, random weights) beside diffusers' own, over the same weights.

    python benchmarks/transformer.py [--blocks 60] [--device cuda] [--results FILE] [--cases ...]

"ours" is the fused path where the machine has an NVIDIA GPU. "plain path" is the same class without it,
bit-equal to diffusers. Times are medians after warm-up, all arms in turn (A B C C B A) in one process.
Checks the errors of both against fp32. Needs 50 GB of device memory for 60 blocks.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage import QwenImageTransformer2DModel, fused
from diffusers_qwenimage.denoise import DenoiseInputs, denoise
from diffusers_qwenimage.kernels import backend, set_backend, use_backend
from diffusers_qwenimage.projections import fuse_
from diffusers_qwenimage.quantize import quantize_
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

TEXT_TOKENS = 128
GIB = 2**30
LORA_MODULES = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
)
CASES = (
    "error",
    "forward",
    "guidance",
    "table",
    "batch",
    "streams",
    "graph",
    "profile",
    "lora",
    "modulation",
    "launch",
    "quantized",
)
KINDS = ("fp8", "int8", "fp8-storage")
# Random weights, 60 blocks: what a kind may be away from bf16. Above it something is wrong, not coarse.
WORST = {"fp8": 0.15, "int8": 0.15, "fp8-storage": 0.12}
Arms = dict[str, Callable[[], object]]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1328, 1024, 512], help="sides of the picture"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="what to measure (all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs on each side of A B B A")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of 8 bits (all)")
    parser.add_argument("--profile", type=Path, help="file for the kernels of one forward")
    args = parser.parse_args()
    set_backend("auto")
    chosen = backend(torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device))
    print(f"fused path: {chosen.name} ({chosen.reason})")

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        record("transformer", case, value, unit, peak_memory_gib=peak, path=args.results)

    def wants(case: str) -> bool:
        return case in args.cases

    large, small = max(args.sizes), min(args.sizes)
    if wants("error"):
        measure_error(args.device, note)
    ours, stock = build(args.blocks, args.device)
    weights = sum(p.numel() * p.element_size() for p in ours.parameters()) / GIB
    note("weights, bf16", weights, "GiB")
    for side in args.sizes:
        if wants("forward"):
            compare_forward(ours, stock, side, args.repeats, note)
        if wants("table"):
            compare_table(ours, side, args.repeats, note)
    if wants("profile") and args.profile:
        profile(ours, large, args.profile)
    if wants("batch"):
        compare_unequal_batch(ours, stock, large, args.repeats, note)
    for side in args.sizes:
        if wants("guidance"):
            compare_guidance(ours, stock, side, args.repeats, note)
        if wants("streams"):
            compare_streams(ours, side, args.repeats, note)
        if wants("launch"):
            measure_launch(ours, side, note)
    if wants("graph"):
        compare_graph(ours, small, args.repeats, note)
    if wants("quantized"):
        for kind in args.kinds:
            compare_quantized(ours, kind, args.sizes, args.repeats, note, args.profile)
    if wants("lora"):
        compare_lora(ours, stock, large, args.repeats, note)
    del stock  # it shares the weights: while it lives, offloading ours frees nothing
    if wants("modulation"):
        measure_modulation(ours, large, note)


def build(blocks: int, device: str) -> tuple[QwenImageTransformer2DModel, torch.nn.Module]:
    """Our transformer and diffusers' over one set of random weights, N(0, 0.02), norms 1."""
    with torch.device("meta"):
        ours = QwenImageTransformer2DModel(num_layers=blocks).to(torch.bfloat16)
        stock = diffusers.QwenImageTransformer2DModel(num_layers=blocks).to(torch.bfloat16)
    ours.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in ours.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    # diffusers keeps its rotary tables as plain tensors: on the meta device they have no values.
    stock.pos_embed = type(stock.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    fuse_(ours.requires_grad_(False))  # before sharing, so that the weights are on the device once
    stock.load_state_dict(ours.state_dict(), assign=True)
    return ours.eval(), stock.eval().requires_grad_(False)


def inputs_of(ours: torch.nn.Module, side: int, batch: int = 1) -> dict[str, object]:
    """Arguments of a forward for a picture of `side` x `side` pixels."""
    device, dtype = ours.device, ours.dtype
    grid = side // 16
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    return {
        "hidden_states": random(batch, grid * grid, 64),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, 3584),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, grid, grid)]] * batch,
        "return_dict": False,
    }


def guidance_inputs(ours: torch.nn.Module, side: int) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments of the packed forward of both branches, and of the negative branch alone (10 tokens)."""
    one = inputs_of(ours, side)
    negative = one["encoder_hidden_states"][:, :10]  # type: ignore[index]
    packed = {
        **one,
        "hidden_states": torch.cat([one["hidden_states"]] * 2),  # type: ignore[list-item]
        "encoder_hidden_states": [one["encoder_hidden_states"][0], negative[0]],  # type: ignore[index]
        "timestep": one["timestep"].expand(2),  # type: ignore[attr-defined]
        "img_shapes": one["img_shapes"] * 2,  # type: ignore[operator]
    }
    return packed, {**one, "encoder_hidden_states": negative}


@torch.no_grad()
def measure_error(device: str, note: Callable[..., None], *, blocks: int = 6, side: int = 512) -> None:
    """Distance to the same model in fp32, for diffusers, our plain path and our fused path in bf16."""
    ours, stock = build(blocks, device)
    for case, inputs in (("forward", inputs_of(ours, side)), ("packed", guidance_inputs(ours, side)[0])):
        results = {"fused path": ours(**inputs)[0]}
        with use_backend("off"):
            results["plain path"] = ours(**inputs)[0]
            if case == "forward":
                results["diffusers"] = stock(**inputs)[0]
            wide = {key: _float(value) for key, value in inputs.items()}
            exact = ours.float()(**wide)[0]
            ours.to(torch.bfloat16)
        for name, result in results.items():
            label = f"{blocks} blocks, {side}x{side} {case}, relative error against fp32, {name}"
            note(label, relative(result, exact), "")


@torch.no_grad()
def compare_forward(
    ours: torch.nn.Module,
    stock: torch.nn.Module,
    side: int,
    repeats: int,
    note: Callable[..., None],
    *,
    with_plain: bool = True,
) -> None:
    """One forward of one picture."""
    one = inputs_of(ours, side)
    tabulated = with_table(ours, one)
    expected, got = stock(**one)[0], tabulated()[0]
    note(f"{side}x{side} forward, ours against diffusers, relative difference", relative(got, expected), "")
    arms: Arms = {
        "diffusers": lambda: stock(**one),
        "ours": lambda: ours(**one),
        "ours, modulation tabulated": tabulated,
    }
    if with_plain:
        with use_backend("off"):
            equal = torch.equal(expected, ours(**one)[0])
        note(f"{side}x{side} forward, plain path bit-equal to diffusers (1 = yes)", float(equal), "")
        arms["ours, plain path"] = plain(ours, one)
    for name, figures in in_turn(arms, repeats).items():
        note(f"{side}x{side} forward, {name}", *figures)


@torch.no_grad()
def compare_guidance(
    ours: torch.nn.Module,
    stock: torch.nn.Module,
    side: int,
    repeats: int,
    note: Callable[..., None],
    *,
    with_plain: bool = True,
) -> None:
    """One step with guidance: diffusers' two forwards against one packed pass."""
    one = inputs_of(ours, side)
    packed, second = guidance_inputs(ours, side)

    def separate() -> Tensor:
        return torch.cat([stock(**one)[0], stock(**second)[0]])

    tabulated = with_table(ours, packed)
    difference = relative(tabulated()[0], separate())
    note(
        f"{side}x{side} packed guidance against diffusers' two forwards, relative difference", difference, ""
    )
    arms = {
        "diffusers (two forwards)": separate,
        "ours (packed, modulation tabulated)": tabulated,
    }
    if with_plain:
        arms["ours, plain path (packed)"] = plain(ours, packed)
    for name, figures in in_turn(arms, repeats).items():
        note(f"{side}x{side} step with guidance, {name}", *figures)


@torch.no_grad()
def compare_table(ours: torch.nn.Module, side: int, repeats: int, note: Callable[..., None]) -> None:
    """The forward with the modulation computed in it, and with it tabulated for the schedule."""
    one = inputs_of(ours, side)
    arms = {"computed": lambda: ours(**one), "tabulated": with_table(ours, one)}
    for name, figures in in_turn(arms, repeats).items():
        note(f"{side}x{side} forward, ours, modulation {name}", *figures)


@torch.no_grad()
def compare_unequal_batch(
    ours: torch.nn.Module, stock: torch.nn.Module, side: int, repeats: int, note: Callable[..., None]
) -> None:
    """Two prompts of 128 and 40 tokens: diffusers pads and masks, ours packs."""
    padded = inputs_of(ours, side, batch=2)
    mask = torch.ones(2, TEXT_TOKENS, device=ours.device, dtype=torch.long)
    mask[1, 40:] = 0
    text = padded["encoder_hidden_states"]
    packed = {**padded, "encoder_hidden_states": [text[0], text[1, :40]]}  # type: ignore[index]
    masked = {**padded, "encoder_hidden_states_mask": mask}
    difference = relative(ours(**packed)[0], stock(**masked)[0])
    note(f"{side}x{side} unequal prompts, packed against masked, relative difference", difference, "")
    arms = {"diffusers (mask)": lambda: stock(**masked), "ours (packed)": with_table(ours, packed)}
    for name, figures in in_turn(arms, repeats).items():
        note(f"{side}x{side} batch of 2 unequal prompts, {name}", *figures)


@torch.no_grad()
def compare_streams(ours: torch.nn.Module, side: int, repeats: int, note: Callable[..., None]) -> None:
    """The text stream and the next block's modulation beside the image stream, and one after the other."""
    for case, inputs in (
        ("forward", inputs_of(ours, side)),
        ("step with guidance", guidance_inputs(ours, side)[0]),
    ):

        def one_stream(inputs: dict[str, object] = inputs) -> None:
            fused.text_beside_image = False
            ours(**inputs)
            fused.text_beside_image = True

        arms: Arms = {"side streams": lambda x=inputs: ours(**x), "one stream": one_stream}
        for name, figures in in_turn(arms, repeats).items():
            note(f"{side}x{side} {case}, ours, {name}", *figures)


@torch.no_grad()
def measure_launch(ours: torch.nn.Module, side: int, note: Callable[..., None]) -> None:
    """Time until the call returns, with an idle GPU: what the processor needs for a forward."""
    one = inputs_of(ours, side)
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        ours(**one)
        times.append(1e3 * (time.perf_counter() - start))
    note(f"{side}x{side} forward, ours, until the call returns", statistics.median(times), "ms")


@torch.no_grad()
def compare_quantized(
    ours: QwenImageTransformer2DModel,
    kind: str,
    sizes: list[int],
    repeats: int,
    note: Callable[..., None],
    profile_to: Path | None,
) -> None:
    """The block linears in 8 bits beside bf16; all that is not quantised is shared."""
    with torch.device("meta"):
        other = QwenImageTransformer2DModel.from_config(ours.config)
    other.load_state_dict(ours.state_dict(), assign=True)
    torch.cuda.synchronize()
    before, start = allocated(), time.perf_counter()
    number = len(quantize_(other.eval().requires_grad_(False), kind))
    fuse_(other)
    torch.cuda.synchronize()
    note(f"{kind}: quantising {number} layers", time.perf_counter() - start, "s")
    note(f"{kind}: weights of these layers", allocated() - before, "GiB")
    for side in sizes:
        one = inputs_of(ours, side)
        difference = relative(other(**one)[0], ours(**one)[0])
        note(f"{side}x{side} forward, {kind} against bf16, relative difference", difference, "")
        if not difference < WORST[kind]:
            raise SystemExit(f"{kind} is {difference:.3f} from bf16: wrong, not measured further.")
        baseline = f"bf16, in turn with {kind}"
        arms: Arms = {baseline: with_table(ours, one), kind: with_table(other, one)}
        for name, figures in in_turn(arms, repeats).items():
            note(f"{side}x{side} forward, ours, modulation tabulated, {name}", *figures)
        measure_launch(other, side, lambda case, *rest: note(f"{case}, {kind}", *rest))
    if profile_to:
        profile(other, max(sizes), profile_to.with_stem(f"{profile_to.stem}-{kind}"))


@torch.no_grad()
def compare_graph(ours: torch.nn.Module, side: int, repeats: int, note: Callable[..., None]) -> None:
    """Replays of a CUDA graph against launching every kernel."""
    for case, inputs in (
        ("forward", inputs_of(ours, side)),
        ("step with guidance", guidance_inputs(ours, side)[0]),
    ):
        ours(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ours(**inputs)[0]
        graph.replay()
        note(f"{side}x{side} {case}, graph equal (1 = yes)", float(torch.equal(got, ours(**inputs)[0])), "")
        arms: Arms = {"launched": lambda x=inputs: ours(**x), "CUDA graph": graph.replay}
        for name, figures in in_turn(arms, repeats).items():
            note(f"{side}x{side} {case}, ours, {name}", *figures)


@torch.no_grad()
def compare_lora(
    ours: torch.nn.Module, stock: torch.nn.Module, side: int, repeats: int, note: Callable[..., None]
) -> None:
    """One adapter of rank 32 on the twelve modules that LoRAs of this model usually have."""
    one = inputs_of(ours, side)
    before = statistics.median(timed(lambda: ours(**one), 2 * repeats))
    for model in (ours, stock):
        torch.manual_seed(0)
        config = LoraConfig(r=32, lora_alpha=32, target_modules=list(LORA_MODULES))
        model.add_adapter(config)  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.empty_like(parameter, dtype=torch.bfloat16).normal_(0, 0.01)
        model.eval().requires_grad_(False)
    stock.load_state_dict(ours.state_dict(), assign=True)
    stock.requires_grad_(False)
    difference = relative(ours(**one)[0], stock(**one)[0])
    note(f"{side}x{side} forward with a LoRA, ours against diffusers, relative difference", difference, "")
    arms = {"diffusers + PEFT": lambda: stock(**one), "ours": lambda: ours(**one)}
    results = in_turn(arms, repeats)
    for name, figures in results.items():
        note(f"{side}x{side} forward with a LoRA of rank 32 on 12 modules, {name}", *figures)
    note(f"{side}x{side} forward, ours, speed kept with the LoRA", before / results["ours"][0], "")


@torch.no_grad()
def measure_modulation(
    ours: QwenImageTransformer2DModel, side: int, note: Callable[..., None], *, num_tabulated: int = 50
) -> None:
    """Denoise four steps with the modulation weights resident, and with them in host memory."""
    grid = side // 16
    text = inputs_of(ours, side)["encoder_hidden_states"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)

    def run() -> tuple[Tensor, float]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        timesteps = set_timesteps(scheduler, even_sigmas(4), num_tokens=grid * grid, device=ours.device)
        inputs = DenoiseInputs(
            latents=inputs_of(ours, side)["hidden_states"],  # type: ignore[arg-type]
            timesteps=timesteps,
            prompt=[text[0]],  # type: ignore[index]
            negative=[text[0, :10]],  # type: ignore[index]
            guidance_scale=4.0,
            image_shapes=[(1, grid, grid)],
        )
        return denoise(ours, scheduler, inputs), torch.cuda.max_memory_allocated() / GIB

    expected, peak = run()
    note("denoising, modulation resident: weights on the device", allocated(), "GiB", peak)
    ours.offload_modulation("cpu")
    torch.cuda.empty_cache()
    got, peak = run()
    note("denoising, modulation tabulated: weights on the device", allocated(), "GiB", peak)
    note("denoising, tabulated against resident, relative difference", relative(got, expected), "")
    if num_tabulated:
        sigmas = torch.linspace(1, 0.02, num_tabulated, device=ours.device, dtype=torch.bfloat16)
        milliseconds = timed(lambda: ours.tabulate_modulation(sigmas, dtype=torch.bfloat16), 1)[0]
        note(f"tabulating {num_tabulated} timesteps from host memory", milliseconds, "ms")
        ours.load_modulation()


def with_table(model: torch.nn.Module, inputs: dict[str, object]) -> Callable[[], object]:
    """A forward whose modulation was tabulated before, as in the pipelines; all samples at one timestep."""
    sigma = inputs["timestep"][:1]  # type: ignore[index]
    table = model.tabulate_modulation(sigma, dtype=torch.bfloat16)  # type: ignore[operator]
    return lambda: model(**inputs, modulation=table.at(0))


@torch.no_grad()
def profile(ours: torch.nn.Module, side: int, path: Path) -> None:
    """Write the kernels of one forward (modulation tabulated), longest first."""
    forward = with_table(ours, inputs_of(ours, side))
    forward()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        forward()
        torch.cuda.synchronize()
    table = recorded.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90
    )
    path.write_text(table, encoding="utf-8")
    print(table)


def plain(ours: torch.nn.Module, inputs: dict[str, object]) -> Callable[[], object]:
    """A call that takes the plain path."""

    def call() -> object:
        with use_backend("off"):
            return ours(**inputs)

    return call


def in_turn(arms: Arms, repeats: int) -> dict[str, tuple[float, str, float]]:
    """Median milliseconds and peak memory of every arm, measured A B C C B A after two warm-ups each."""
    for function in [*arms.values()] * 2:
        function()
    times: dict[str, list[float]] = {name: [] for name in arms}
    peaks = {}
    for name in [*arms, *reversed(arms)]:
        torch.cuda.reset_peak_memory_stats()
        times[name] += timed(arms[name], repeats)
        peaks[name] = torch.cuda.max_memory_allocated() / GIB
    return {name: (statistics.median(times[name]), "ms", peaks[name]) for name in arms}


def timed(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each run, by device events."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in fp32."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def allocated() -> float:
    """GiB allocated on the device now."""
    return torch.cuda.memory_allocated() / GIB


def _float(value: object) -> object:
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, list) and isinstance(value[0], Tensor):
        return [item.float() for item in value]
    return value


if __name__ == "__main__":
    main()
