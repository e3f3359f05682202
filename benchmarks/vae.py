"""The autoencoder at its true size (random weights) on one picture, beside diffusers' own.

    python benchmarks/vae.py [--sides 1024 1328] [--device cuda] [--results FILE]

Encode and decode in bf16: diffusers (3-D convolutions), ours (2-D, in both memory layouts), ours in tiles.
Times are medians after warm-up, the cases in turn, in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage import AutoencoderKLQwenImage

GIB = 2**30


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 1328], help="sides of the picture")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each case")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    vaes = build(args.device)
    for side in args.sides:
        for part, cases in cases_of(vaes, side, args.device).items():
            results = {name: run() for name, run in cases.items()}
            expected = results["diffusers"].float()
            for name, result in results.items():
                difference = float((result.float() - expected).norm() / expected.norm())
                case = f"{side}x{side} {part}, {name}"
                record("vae", f"{case}, relative difference", difference, "", path=args.results)
            for name, (seconds, peak) in measure(cases, args.repeats, args.device).items():
                case = f"{side}x{side} {part}, {name}"
                record("vae", case, 1000 * seconds, "ms", peak_memory_gib=peak, path=args.results)


def build(device: str) -> dict[str, torch.nn.Module]:
    """The cases, over the same random weights."""
    torch.manual_seed(0)
    stock = diffusers.AutoencoderKLQwenImage().to(device, torch.bfloat16).eval().requires_grad_(False)
    found: dict[str, torch.nn.Module] = {"diffusers": stock}
    for name in ("ours", "ours channels last", "ours channels last, tiles of 64 latent pixels"):
        vae = AutoencoderKLQwenImage().to(device, torch.bfloat16).eval().requires_grad_(False)
        vae.load_state_dict(stock.state_dict(), assign=True)
        if "channels last" in name:
            vae.image_memory_format = torch.channels_last
        if "tiles" in name:
            vae.enable_tiling(tile_size=64, tile_stride=48)
        found[name] = vae
    return found


def cases_of(
    vaes: dict[str, torch.nn.Module], side: int, device: str
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Encode and decode of each VAE."""
    pixels = torch.rand(1, 3, 1, side, side, device=device, dtype=torch.bfloat16) * 2 - 1
    latents = torch.randn(1, 16, 1, side // 8, side // 8, device=device, dtype=torch.bfloat16)

    def encode(vae: torch.nn.Module) -> Callable[[], Tensor]:
        return lambda: vae.encode(pixels).latent_dist.mean

    def decode(vae: torch.nn.Module) -> Callable[[], Tensor]:
        return lambda: vae.decode(latents).sample

    return {
        "encode": {name: encode(vae) for name, vae in vaes.items()},
        "decode": {name: decode(vae) for name, vae in vaes.items()},
    }


def measure(
    cases: dict[str, Callable[[], Tensor]], repeats: int, device: str
) -> dict[str, tuple[float, float | None]]:
    """Median seconds and peak memory beyond the weights (GiB, on a GPU) of each case, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, float | None] = dict.fromkeys(cases)
    for repeat in range(repeats + 2):
        for name, run in cases.items():
            before = _start(device)
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / GIB
            if repeat >= 2:  # warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(times), peaks[name]) for name, times in seconds.items()}


def _start(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    with torch.no_grad():
        main()
