"""The fused operations one by one, at the sizes of a 1328x1328 picture with 128 text tokens.

    python benchmarks/kernels.py [--results FILE] [--sweep [forward attention norm rope]]

First the relative difference of every kernel to its reference, then times against what it replaces. "GB/s"
counts every input read once and every output written once.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from results import RESULTS, record
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from diffusers_qwenimage.kernels import backend, matmul, norm, quantized, rope, set_backend
from diffusers_qwenimage.kernels.rows import Target

WIDTH, HEADS, TEXT, IMAGE = 3072, 24, 128, 6889
DTYPE = torch.bfloat16


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="what to measure (all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    parser.add_argument(
        "--sweep", nargs="*", help="time configurations instead: all, or those of these cases"
    )
    args = parser.parse_args()
    if args.sweep is not None:
        from kernel_sweep import sweep  # not above: transformers imports this file, taking it for a package

        sweep(args.sweep)
        return
    torch.manual_seed(0)
    set_backend("auto")
    print(backend(torch.device("cuda", 0)))

    def note(case: str, function: Callable[[], object], *, flop: float = 0, values: int = 0) -> None:
        microseconds = timed(function)
        record("kernels", case, microseconds, "us", path=args.results)
        if flop:
            print(f"    {flop / microseconds / 1e6:.0f} TFLOP/s")
        if values:
            print(f"    {values * 2 / microseconds / 1e3:.0f} GB/s")

    with torch.no_grad():
        for dtype in (
            () if "differences" not in args.cases else (torch.bfloat16, torch.float16, torch.float32)
        ):
            for tokens, heads, dim in ((TEXT + IMAGE, HEADS, WIDTH // HEADS), (1, 3, 16), (13, 11, 100)):
                for case, difference in differences(tokens, heads, dim, dtype).items():
                    label = (
                        f"{case}, {tokens} x {heads} x {dim}, {dtype}, relative difference to the reference"
                    )
                    record("kernels", label, difference, "", path=args.results)
        for case in args.cases:
            if case in MEASURES:
                MEASURES[case](note)


def differences(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """||kernel - reference|| / ||reference|| of every operation, two modulations, on random values."""
    width = heads * dim
    x, y = random(1, tokens, width, dtype=dtype), random(1, tokens, width, dtype=dtype)
    gate, scale, shift = random(2, 6 * width, dtype=dtype).chunk(6, dim=-1)[:3]
    index = (torch.arange(tokens, device="cuda") % 2).int()
    total, h = norm.gate_norm_modulate(x, y, gate, scale, shift, index)
    total_reference, h_reference = norm.gate_norm_modulate_reference(x, y, gate, scale, shift, index)
    qkv, head_weight = random(tokens, 3, heads, dim, dtype=dtype), random(dim, dtype=dtype)
    angle = torch.rand(tokens, dim // 2, device="cuda")
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)
    turned_reference = rope.norm_rotate_reference(qkv, head_weight, head_weight, table)
    rows = torch.arange(tokens, device="cuda", dtype=torch.int32)
    rope.norm_rotate_into(qkv, rows, head_weight, head_weight, table)
    weight, bias = random(4 * width, width, dtype=dtype) / width**0.5, random(4 * width, dtype=dtype)
    up, up_reference = matmul.linear_gelu(x, weight, bias), matmul.linear_gelu_reference(x, weight, bias)
    pairs = {
        "gate": (total, total_reference),
        "gate + norm + modulation": (h, h_reference),
        "norm + rotation": (qkv, turned_reference),
        "GELU in the product": (up, up_reference),
    }
    return {
        case: float((a.double() - b.double()).norm() / b.double().norm()) for case, (a, b) in pairs.items()
    }


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """N(0, 1) on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype)


def timed(function: Callable[[], object], repeats: int = 15) -> float:
    """Median microseconds of a call, its inputs not in the cache."""
    flush = torch.empty(256 * 2**20, device="cuda", dtype=torch.int8)
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def measure_norm(note: Callable[..., None]) -> None:
    """Gate, residual, LayerNorm and modulation."""
    for tokens in (IMAGE, TEXT):
        x, y = random(1, tokens, WIDTH), random(1, tokens, WIDTH)
        shift, scale, gate = random(1, 6 * WIDTH).chunk(6, dim=-1)[:3]

        def separate(x: Tensor = x, y: Tensor = y) -> Tensor:
            total = x + gate * y  # noqa: B023
            return layer_norm(total, (WIDTH,), eps=1e-6) * (1 + scale) + shift  # noqa: B023

        size = x.numel()
        note(f"{tokens} tokens, gate + norm + modulation, separate", separate)
        note(
            f"{tokens} tokens, gate + norm + modulation, one kernel",
            lambda: norm.gate_norm_modulate(x, y, gate, scale, shift),  # noqa: B023
            values=4 * size,
        )
        note(
            f"{tokens} tokens, norm + modulation, one kernel",
            lambda: norm.norm_modulate(x, scale, shift),  # noqa: B023
            values=2 * size,
        )
        note(
            f"{tokens} tokens, gate, one kernel",
            lambda: norm.gate_add(x, y, gate),  # noqa: B023
            values=3 * size,
        )


def measure_rope(note: Callable[..., None]) -> None:
    """RMSNorm and rotary positions of queries and keys."""
    dim = WIDTH // HEADS
    joint = random(TEXT + IMAGE, 3, HEADS, dim)
    weight = torch.ones(dim, device="cuda", dtype=DTYPE)
    for tokens, start in ((IMAGE, TEXT), (TEXT, 0)):
        angle = torch.rand(tokens, dim // 2, device="cuda")
        table = torch.stack([angle.cos(), angle.sin()], dim=-1)
        rows = torch.arange(start, start + tokens, device="cuda", dtype=torch.int32)
        note(
            f"{tokens} tokens, norm + rotation, one kernel",
            lambda: rope.norm_rotate_into(joint, rows, weight, weight, table),  # noqa: B023
            values=4 * tokens * WIDTH,
        )


def measure_matmul(note: Callable[..., None]) -> None:
    """Fused projections, and GELU at the end of the matrix product."""
    joint = random(TEXT + IMAGE, 3 * WIDTH)
    weight, bias = random(3 * WIDTH, WIDTH), random(3 * WIDTH)
    up, up_bias = random(4 * WIDTH, WIDTH), random(4 * WIDTH)
    for tokens in (IMAGE, TEXT):
        x, out = random(tokens, WIDTH), joint[:tokens]
        flop = 2 * tokens * WIDTH * WIDTH

        def three(x: Tensor = x, out: Tensor = out) -> None:
            for column, part, one in zip(out.chunk(3, 1), weight.chunk(3), bias.chunk(3), strict=True):
                matmul.linear_into(column, x, part, one)

        note(f"{tokens} tokens, queries, keys and values, three products", three, flop=3 * flop)
        note(
            f"{tokens} tokens, queries, keys and values, one product",
            lambda: matmul.linear_into(out, x, weight, bias),  # noqa: B023
            flop=3 * flop,
        )
        note(
            f"{tokens} tokens, MLP up, without GELU",
            lambda: torch.addmm(up_bias, x, up.t()),  # noqa: B023
            flop=4 * flop,
        )
        note(
            f"{tokens} tokens, MLP up, GELU apart",
            lambda: gelu(torch.addmm(up_bias, x, up.t()), approximate="tanh"),  # noqa: B023
            flop=4 * flop,
        )
        note(
            f"{tokens} tokens, MLP up, GELU in the product",
            lambda: matmul.linear_gelu(x, up, up_bias),  # noqa: B023
            flop=4 * flop,
        )


def measure_attention(note: Callable[..., None]) -> None:
    """Attention on views of the joint buffer, and on tensors of their own."""
    tokens = TEXT + IMAGE
    joint = random(1, tokens, 3, HEADS, WIDTH // HEADS)
    flop = 4 * tokens * tokens * WIDTH
    views = [part.transpose(1, 2) for part in joint.unbind(2)]
    copies = [part.contiguous() for part in views]
    note("attention on the joint buffer", lambda: scaled_dot_product_attention(*views), flop=flop)
    note("attention on contiguous tensors", lambda: scaled_dot_product_attention(*copies), flop=flop)


def measure_quantized(note: Callable[..., None]) -> None:
    """Quantising tokens, and products of 8 bits."""
    for dtype, rotation in ((torch.float8_e4m3fn, 0), (torch.int8, 256)):
        target = Target(dtype, rotation)
        kind = "fp8" if dtype == torch.float8_e4m3fn else "int8"
        hidden, tokens = random(IMAGE, 4 * WIDTH), random(IMAGE, WIDTH)
        note(f"{IMAGE} tokens, GELU to {kind}", lambda: quantized.gelu_quantize(hidden, target))  # noqa: B023
        note(f"{IMAGE} tokens, {kind} of 3072 values", lambda: quantized.quantize_rows(tokens, target))  # noqa: B023
        for count, inputs, outputs in (
            (IMAGE, WIDTH, 4 * WIDTH),
            (IMAGE, 4 * WIDTH, WIDTH),
            (TEXT, 4 * WIDTH, WIDTH),
        ):
            x = quantized.quantize_rows(random(count, inputs), target)
            weight = quantized.quantize_rows(random(outputs, inputs), target)
            run = partial(quantized.scaled_linear, x, *weight, random(outputs), DTYPE)
            note(
                f"{count} tokens, {kind} product, {inputs} to {outputs}",
                run,
                flop=2 * count * inputs * outputs,
            )


MEASURES = {
    "norm": measure_norm,
    "rope": measure_rope,
    "matmul": measure_matmul,
    "attention": measure_attention,
    "quantized": measure_quantized,
}
CASES = ("differences", *MEASURES)


if __name__ == "__main__":
    main()
