"""A whole picture, from text embeddings to a Pillow image: ours beside diffusers over the same weights.

    python benchmarks/end_to_end.py [--cases 1328:8 512:8] [--arms ...] [--device cuda] [--results FILE]

True-size transformer and autoencoder; 128 tokens of prompt, 10 of negative prompt, guidance. Text encoding is
left out: it is the same model for all. Each arm makes a first picture, with all that it compiles, tries out
and records (Triton's cache starts empty), and a second; then arms run in turn (A B C C B A) in one process:
median, and the range. Step caches are not compared here: what
they decide on random weights means nothing (benchmarks/step_reduction.py). 65 GB of device memory with fp8.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from results import RESULTS, record
from transformer import GIB, TEXT_TOKENS, build

from diffusers_qwenimage import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers_qwenimage.graphs import graphs_of

EXACT = ("diffusers", "ours")
ARMS = (*EXACT, "diffusers, compiled", "ours, fp8", "ours, int8", "ours, fp8-storage")
NEGATIVE_TOKENS = 10


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=["1328:8", "512:8"], metavar="SIDE:STEPS", help="pictures to make"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(EXACT), help="what to compare")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of A B B A (1), or none")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--base-dim", type=int, default=96, help="channels of the autoencoder (96)")
    parser.add_argument("--device", default="cuda", help="device to measure on (cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    cases = [tuple(int(number) for number in case.split(":")) for case in args.cases]

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        pipes = build_pipelines(args.arms, args.blocks, args.base_dim, args.device)
        for side, steps in cases:
            compare(pipes, side, steps, args)


def build_pipelines(arms: list[str], blocks: int, base_dim: int, device: str) -> dict[str, Any]:
    """A pipeline for each arm; weights in bf16 are shared."""
    ours, stock = build(blocks, device)
    torch.manual_seed(0)
    stock_vae = diffusers.AutoencoderKLQwenImage(base_dim=base_dim).eval().requires_grad_(False)
    stock_vae.to(device, torch.bfloat16)
    our_vae = AutoencoderKLQwenImage(base_dim=base_dim).eval().requires_grad_(False)
    our_vae.load_state_dict(stock_vae.state_dict(), assign=True)
    pipes: dict[str, Any] = {}
    for arm in arms:
        package, vae = (diffusers.QwenImagePipeline, stock_vae)
        transformer: torch.nn.Module = stock
        if arm.startswith("ours"):
            package, vae = QwenImagePipeline, our_vae
            transformer = ours if arm == "ours" else _copy(ours)
        elif arm != "diffusers":
            transformer = _copy(stock)
            transformer.compile_repeated_blocks()  # type: ignore[operator]
        pipe = package(
            scheduler=_scheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
        )
        pipe.set_progress_bar_config(disable=True)
        if arm.startswith("ours"):
            print(f"{arm}:\n{pipe.optimize(weights=arm.partition(', ')[2] or None)}", flush=True)
        pipes[arm] = pipe
    return pipes


def _copy(model: Any) -> Any:
    """Another model over the same weights."""
    with torch.device("meta"):
        other = type(model).from_config(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    if not isinstance(model, QwenImageTransformer2DModel):  # its rotary tables are no buffers
        other.pos_embed = model.pos_embed
    return other.eval().requires_grad_(False)


def _scheduler() -> diffusers.FlowMatchEulerDiscreteScheduler:
    """With the published configuration."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )


def compare(pipes: dict[str, Any], side: int, steps: int, args: argparse.Namespace) -> None:
    """First and later pictures of every arm."""
    label = f"{side}x{side}, {steps} steps with guidance"

    def note(case: str, value: float, unit: str, peak: float | None = None) -> None:
        record("end_to_end", f"{label}, {case}", value, unit, peak_memory_gib=peak, path=args.results)

    pictures = {}
    for name, pipe in pipes.items():
        for which in ("first", "second"):
            seconds, peak, pictures[name] = picture(pipe, side, steps, args.device)
            note(f"{name}: {which} picture", seconds, "s", peak)
    times: dict[str, list[float]] = {name: [] for name in pipes}
    peaks: dict[str, float | None] = {}
    for name in [*pipes, *reversed(pipes)] * args.rounds:
        seconds, peaks[name], pictures[name] = picture(pipes[name], side, steps, args.device)
        times[name].append(seconds)
    reference = pictures[next(iter(pipes))].astype(np.float64)
    for name, measured in times.items():
        if measured:
            note(f"{name}: picture", statistics.median(measured), "s", peaks[name])
            print(f"    {min(measured):.3f} to {max(measured):.3f} s", flush=True)
        if name != next(iter(pipes)):
            error = max(((pictures[name] - reference) ** 2).mean(), 1e-9)
            note(f"{name}: PSNR to {next(iter(pipes))}", float(10 * np.log10(255**2 / error)), "dB")
    for pipe in pipes.values():
        if isinstance(pipe.transformer, QwenImageTransformer2DModel):
            print(f"    graphs recorded: {graphs_of(pipe.transformer).number}", flush=True)


def picture(pipe: Any, side: int, steps: int, device: str) -> tuple[float, float | None, Any]:
    """Seconds, peak memory in GiB (of a GPU) and the picture, uint8 [H, W, 3]."""
    generator = torch.Generator(device).manual_seed(1)

    def embeds(tokens: int) -> torch.Tensor:
        return torch.randn(
            1, tokens, pipe.transformer.config.joint_attention_dim,
            generator=generator, device=device, dtype=torch.bfloat16,
        )  # fmt: skip

    prompt, negative = embeds(TEXT_TOKENS), embeds(NEGATIVE_TOKENS)
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    image = pipe(
        prompt_embeds=prompt,
        prompt_embeds_mask=torch.ones(prompt.shape[:2], device=device, dtype=torch.long),
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=torch.ones(negative.shape[:2], device=device, dtype=torch.long),
        true_cfg_scale=4.0,
        num_inference_steps=steps,
        height=side,
        width=side,
        generator=torch.Generator(device).manual_seed(0),
    ).images[0]
    wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / GIB if device.startswith("cuda") else None
    return seconds, peak, np.asarray(image)


if __name__ == "__main__":
    main()
