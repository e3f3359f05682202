"""What the processor does per block of the transformer before a GPU can compute it.

    python benchmarks/launch.py [--blocks 60] [--device cpu] [--results FILE]

On the CPU the blocks are tiny and the Triton kernels are left out: Python and torch's own calls remain. On a
GPU it is the time until the call returns, before the GPU is done.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import RESULTS, record

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.kernels import set_backend, use_backend
from diffusers_qwenimage.quantize import quantize_

TINY = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "in_channels": 16,
    "out_channels": 4,
    "axes_dims_rope": (8, 4, 4),
}


def main() -> None:
    """Measure the plain path, the fused path, the fused path with tabulated modulation, and in fp8."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--device", default="cpu", help="cpu (tiny blocks, no kernels) or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if on_cpu:
        leave_out_kernels()
        torch.set_num_threads(1)
    set_backend("triton" if on_cpu else "auto")
    dtype = torch.float32 if on_cpu else torch.bfloat16
    model = QwenImageTransformer2DModel(num_layers=args.blocks, **TINY).to(args.device, dtype).eval()
    model.requires_grad_(False)
    side, num_text = (2, 3) if on_cpu else (12, 128)  # fp8 products of fewer rows than 128 take more steps
    inputs = {
        "hidden_states": torch.randn(1, side * side, 16, device=args.device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, num_text, 16, device=args.device, dtype=dtype),
        "timestep": torch.tensor([0.5], device=args.device, dtype=dtype),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }
    with torch.no_grad():
        table = model.tabulate_modulation(inputs["timestep"], dtype=dtype)
        cases: dict[str, Callable[[], object]] = {
            "fused path": lambda: model(**inputs),
            "fused path, modulation tabulated": lambda: model(**inputs, modulation=table.at(0)),
        }
        figures = {"plain path": plain(lambda: model(**inputs), args.blocks)}
        figures |= {name: per_block(function, args.blocks) for name, function in cases.items()}
        if not on_cpu:  # there, the references of the 8-bit operations would be measured
            quantize_(model, "fp8")
            figures |= {f"{name}, fp8": per_block(function, args.blocks) for name, function in cases.items()}
    what = "tiny blocks, kernels left out" if on_cpu else "tiny blocks"
    for name, value in figures.items():
        record("launch", f"processor time per block, {what}, {name}", value, "us", path=args.results)


def plain(function: Callable[[], object], blocks: int) -> float:
    """`per_block` of the plain path."""
    with use_backend("off"):
        return per_block(function, blocks)


def per_block(function: Callable[[], object], blocks: int, repeats: int = 15) -> float:
    """Least microseconds of this thread per block: what else runs on the machine only adds."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times) / blocks * 1e6


def leave_out_kernels() -> None:
    """Launch nothing; the interpreter is only there so that the kernels' files load without a GPU."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from diffusers_qwenimage.kernels import norm, quantized, rope

    for module, name in (
        (norm, "_run"), (rope, "_run"), (quantized, "_run_quantize"), (quantized, "_run_dequantize"),
    ):  # fmt: skip
        setattr(module, name, lambda *arguments: None)


if __name__ == "__main__":
    main()
