"""The autoencoder at its true size (random weights) on one picture, beside diffusers' own.

    python benchmarks/vae.py [--sides 1024 1328] [--cases ...] [--device cuda] [--results FILE]

Encode and decode in bf16: diffusers (3-D convolutions), ours without and with the fused path, and in tiles.
Errors are against diffusers in fp32. Times are medians after warm-up, the cases in turn, in one process.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from results import RESULTS, record
from torch import Tensor
from triton.runtime.errors import TritonError

from diffusers_qwenimage import AutoencoderKLQwenImage
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.kernels.vae_attention import Tile, why_not, wide_attention, wide_attention_reference
from diffusers_qwenimage.vae_fused import why_not as why_not_fused

GIB = 2**30
CASES = ("error", "time", "attention", "profile")
ARMS = {
    "diffusers": None,
    "ours, plain": "off",
    "ours, plain, tiles of 64 latent pixels": "off",
    "ours, fused": "auto",
    "ours, fused, convolutions tried out": "auto",
}
TILES = [
    Tile(queries=queries, keys=keys, warps=warps, stages=stages)
    for queries, keys, warps, stages in [
        (64, 32, 8, 2),
        (64, 32, 8, 3),
        (64, 64, 8, 1),
        (128, 32, 8, 2),
        (128, 32, 16, 2),
        (128, 64, 8, 1),
    ]
]
Cases = dict[str, Callable[[], Tensor]]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 1328], help="sides of the picture")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=["error", "time"], help="what to measure"
    )
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--base-dim", type=int, default=96, help="channels at full resolution (96)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each case")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    parser.add_argument("--profile", type=Path, help="file for the kernels of one decode and one encode")
    args = parser.parse_args()

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        record("vae", case, value, unit, peak_memory_gib=peak, path=args.results)

    stock, ours = build(args.device, args.base_dim)
    if "profile" in args.cases and args.profile:
        profile(ours, max(args.sides), args.device, args.profile)
    if "error" in args.cases:
        measure_errors(stock, ours, args.device, min(384, *args.sides), note)
    if "attention" in args.cases:
        compare_attention(4 * args.base_dim, max(args.sides) // 8, args.device, args.repeats, note)
    for side in args.sides:
        if "time" in args.cases:
            compare(stock, ours, side, args, note)


def build(device: str, base_dim: int) -> tuple[torch.nn.Module, AutoencoderKLQwenImage]:
    """diffusers' and ours over the same random weights, in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        stock = diffusers.AutoencoderKLQwenImage(base_dim=base_dim).eval().requires_grad_(False)
        ours = AutoencoderKLQwenImage(base_dim=base_dim).eval().requires_grad_(False)
    stock.to(torch.bfloat16)
    ours.load_state_dict(stock.state_dict(), assign=True)
    return stock, ours


def inputs(side: int, device: str) -> tuple[Tensor, Tensor]:
    """Pixels and latents of one picture."""
    generator = torch.Generator(device).manual_seed(1)
    pixels = torch.rand(1, 3, 1, side, side, generator=generator, device=device, dtype=torch.bfloat16) * 2 - 1
    latents = torch.randn(
        1, 16, 1, side // 8, side // 8, generator=generator, device=device, dtype=torch.bfloat16
    )
    return pixels, latents


def encode(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Mean of the posterior."""
    mean: Tensor = vae.encode(pixels).latent_dist.mean
    return mean


def decode(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """Pixels."""
    sample: Tensor = vae.decode(latents).sample
    return sample


def measure_errors(
    stock: torch.nn.Module, ours: AutoencoderKLQwenImage, device: str, side: int, note: Callable[..., None]
) -> None:
    """Distance to diffusers in fp32."""
    pixels, latents = inputs(side, device)
    for part, run, x in (("encode", encode, pixels), ("decode", decode, latents)):
        results = {}
        for name, backend in (("diffusers", None), ("ours, plain", "off"), ("ours, fused", "auto")):
            with use_backend(backend):
                results[name] = run(ours if backend else stock, x)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = run(stock.float(), x.float())
        stock.to(torch.bfloat16)
        ours.load_state_dict(stock.state_dict(), assign=True)
        for name, result in results.items():
            error = float((result.float() - exact).norm() / exact.norm())
            note(f"{side}x{side} {part}, relative error against fp32, {name}", error, "")


def compare(
    stock: torch.nn.Module,
    ours: AutoencoderKLQwenImage,
    side: int,
    args: argparse.Namespace,
    note: Callable[..., None],
) -> None:
    """Time and memory of encode and decode, all arms in turn."""
    pixels, latents = inputs(side, args.device)
    why = why_not_fused(ours, ours.decoder, latents)
    print("fused path:", "taken" if why is None else f"not taken, {why}")
    for part, run, x in (("encode", encode, pixels), ("decode", decode, latents)):
        cases = {name: arm(run, stock, ours, name, x) for name in ARMS}
        for name, (seconds, spread, peak) in measure(cases, args.repeats, args.device).items():
            note(f"{side}x{side} {part}, {name}", 1000 * seconds, "ms", peak)
            print(f"    quarter to quarter {1000 * spread:.2f} ms")


def arm(
    run: Callable[..., Tensor], stock: torch.nn.Module, ours: AutoencoderKLQwenImage, name: str, x: Tensor
) -> Callable[[], Tensor]:
    """What one arm runs."""
    backend, model = ARMS[name], stock if ARMS[name] is None else ours

    def call() -> Tensor:
        tried = torch.backends.cudnn.flags(enabled=True, benchmark="tried out" in name)
        with use_backend(backend), tried:
            if "tiles" in name:
                ours.enable_tiling(tile_size=64, tile_stride=48)
            result = run(model, x)
            ours.disable_tiling()
        return result

    return call


def measure(cases: Cases, repeats: int, device: str) -> dict[str, tuple[float, float, float | None]]:
    """Median seconds, interquartile range and peak memory beyond the weights (GiB, on a GPU), in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, float | None] = dict.fromkeys(cases)
    for repeat in range(repeats + 2):
        for name, run in cases.items():
            before = _start(device)
            start = time.perf_counter()
            result = run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / GIB
            if repeat >= 2:  # warm-up
                seconds[name].append(time.perf_counter() - start)
            del result
    found = {}
    for name, times in seconds.items():
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [0.0, 0.0, 0.0]
        found[name] = statistics.median(times), quarters[2] - quarters[0], peaks[name]
    return found


def compare_attention(channels: int, side: int, device: str, repeats: int, note: Callable[..., None]) -> None:
    """The attention of the middle block: torch's choice, and the kernel with different tiles."""
    qkv = torch.randn(1, side * side, 3 * channels, device=device, dtype=torch.bfloat16)
    expected = wide_attention_reference(qkv).float()
    cases: Cases = {"torch": lambda: wide_attention_reference(qkv)}
    with use_backend("auto"):
        if reason := why_not(qkv):
            print("attention kernel:", reason)
            return
        for tile in TILES:
            name = ", ".join(f"{value} {key}" for key, value in dataclasses.asdict(tile).items())
            try:
                got = wide_attention(qkv, tile).float()
            except (TritonError, RuntimeError) as error:  # does not fit the chip's memory or registers
                print(f"    {name}: {type(error).__name__}: {str(error)[:100]}")
                continue
            print(f"    {name}: relative difference {float((got - expected).norm() / expected.norm()):.2e}")
            cases[name] = lambda tile=tile: wide_attention(qkv, tile)  # type: ignore[misc]
        for name, (seconds, _, _) in measure(cases, repeats, device).items():
            note(f"attention over {side}x{side} of {channels} channels, {name}", 1000 * seconds, "ms")


def profile(ours: AutoencoderKLQwenImage, side: int, device: str, path: Path) -> None:
    """Write the kernels of one decode and one encode on the fused path, longest first."""
    pixels, latents = inputs(side, device)
    tables = []
    for part, run, x in (("decode", decode, latents), ("encode", encode, pixels)):
        run(ours, x)
        with torch.profiler.profile() as recorded:
            run(ours, x)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        order = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80)
        tables.append(f"{part} {side}x{side}\n{table}")
    path.write_text("\n".join(tables), encoding="utf-8")


def _start(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    with torch.no_grad():
        main()
