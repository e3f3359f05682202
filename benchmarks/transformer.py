"""The transformer at its true size (60 blocks, random weights) beside diffusers' own, over the same weights.

    python benchmarks/transformer.py [--blocks 60] [--device cuda] [--results FILE]

Checks that both give the same velocities (bit for bit in bf16), that the modulation table and the packed
guidance change nothing beyond rounding, and what they save. Times are medians after warm-up, both libraries
in turn (A B B A) in one process. Needs 45 GB of device memory for 60 blocks.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.denoise import DenoiseInputs, denoise
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

TEXT_TOKENS = 128
GIB = 2**30


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[512, 1024, 1328], help="sides of the picture"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side of A B B A")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    ours, stock = build(args.blocks, args.device)

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        record("transformer", case, value, unit, peak_memory_gib=peak, path=args.results)

    weights = sum(p.numel() * p.element_size() for p in ours.parameters()) / GIB
    note("weights, bf16", weights, "GiB")
    for side in args.sizes:
        compare_step(ours, stock, side, args.repeats, note)
    compare_unequal_batch(ours, stock, args.sizes[-1], args.repeats, note)
    measure_modulation(ours, args.sizes[-1], note)


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
    stock.load_state_dict(ours.state_dict(), assign=True)
    return ours.eval().requires_grad_(False), stock.eval().requires_grad_(False)


def inputs_of(ours: torch.nn.Module, side: int, batch: int = 1) -> dict[str, object]:
    """Arguments of a forward for a picture of `side` x `side` pixels."""
    device, dtype = ours.device, torch.bfloat16
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


@torch.no_grad()
def compare_step(
    ours: torch.nn.Module, stock: torch.nn.Module, side: int, repeats: int, note: Callable[..., None]
) -> None:
    """One forward, and one step with guidance: diffusers' two forwards against one packed pass."""
    one = inputs_of(ours, side)
    expected, got = stock(**one)[0], ours(**one)[0]
    note(
        f"{side}x{side} forward, ours bit-equal to diffusers (1 = yes)", float(torch.equal(expected, got)), ""
    )
    theirs, mine = in_turn(lambda: stock(**one), lambda: ours(**one), repeats)
    note(f"{side}x{side} forward, diffusers", *theirs)
    note(f"{side}x{side} forward, ours", *mine)

    negative = one["encoder_hidden_states"][:, :10]  # type: ignore[index]
    packed = {
        **one,
        "hidden_states": torch.cat([one["hidden_states"]] * 2),  # type: ignore[list-item]
        "encoder_hidden_states": [one["encoder_hidden_states"][0], negative[0]],  # type: ignore[index]
        "timestep": one["timestep"].expand(2),  # type: ignore[attr-defined]
        "img_shapes": one["img_shapes"] * 2,  # type: ignore[operator]
    }

    def separate() -> Tensor:
        second = {**one, "encoder_hidden_states": negative}
        return torch.cat([stock(**one)[0], stock(**second)[0]])

    note(
        f"{side}x{side} packed guidance against two forwards, relative difference",
        relative(ours(**packed)[0], separate()),
        "",
    )
    theirs, mine = in_turn(separate, lambda: ours(**packed), repeats)
    note(f"{side}x{side} step with guidance, diffusers (two forwards)", *theirs)
    note(f"{side}x{side} step with guidance, ours (packed)", *mine)


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
    note(
        f"{side}x{side} unequal prompts, packed against masked, relative difference",
        relative(ours(**packed)[0], stock(**masked)[0]),
        "",
    )
    theirs, mine = in_turn(lambda: stock(**masked), lambda: ours(**packed), repeats)
    note(f"{side}x{side} batch of 2 unequal prompts, diffusers (mask)", *theirs)
    note(f"{side}x{side} batch of 2 unequal prompts, ours (packed)", *mine)


@torch.no_grad()
def measure_modulation(ours: QwenImageTransformer2DModel, side: int, note: Callable[..., None]) -> None:
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
    note("denoising, table bit-equal to resident (1 = yes)", float(torch.equal(expected, got)), "")
    sigmas = torch.linspace(1, 0.02, 50, device=ours.device, dtype=torch.bfloat16)
    milliseconds = timed(lambda: ours.tabulate_modulation(sigmas, dtype=torch.bfloat16), 1)[0]
    note("tabulating 50 timesteps from host memory", milliseconds, "ms")
    ours.load_modulation()


def in_turn(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[tuple[float, str, float], tuple[float, str, float]]:
    """Median milliseconds and peak memory of both, measured A B B A after two warm-ups each."""
    for function in (first, second, first, second):
        function()
    times: dict[Callable[[], object], list[float]] = {first: [], second: []}
    peaks: dict[Callable[[], object], float] = {}
    for function in (first, second, second, first):
        torch.cuda.reset_peak_memory_stats()
        times[function] += timed(function, repeats)
        peaks[function] = torch.cuda.max_memory_allocated() / GIB
    results = [(statistics.median(times[f]), "ms", peaks[f]) for f in (first, second)]
    return results[0], results[1]


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


if __name__ == "__main__":
    main()
