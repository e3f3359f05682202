"""LoRA tools on files of the published size: merge, resize, bake and extract, time and peak memory.

    python benchmarks/lora_tools.py [--rank 54] [--blocks 6] [--results FILE]

Each case runs in a process of its own. The LoRA has all 846 linears in bf16 (rank 54: 1 GB); the checkpoint
has `--blocks` blocks of true size in bf16 (6: 4 GB), as one file. Memory should hardly depend on its size.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from lora_convert import write_lora
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage.files import replace_file
from diffusers_qwenimage.lora.architectures import QWEN_IMAGE
from diffusers_qwenimage.lora.bake import bake_loras
from diffusers_qwenimage.lora.extract import extract_lora
from diffusers_qwenimage.lora.factors import derived
from diffusers_qwenimage.lora.merge import merge_loras
from diffusers_qwenimage.lora.read import open_tensors, read_header
from diffusers_qwenimage.lora.resize import RankRule, resize_lora
from diffusers_qwenimage.lora.updates import StoredTensor
from diffusers_qwenimage.lora.write import stream_safetensors

GIB = 2**30
CASES = {
    "merge": "merge two LoRAs with weights 1 and 0.5, and verify",
    "resize": "resize a LoRA to rank 16, and verify",
    "bake": "bake a LoRA of rank 32 into a checkpoint",
    "extract": "extract a LoRA of rank 32 from two checkpoints",
}


def main() -> None:
    """Write the files, then run each case in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=54, help="rank of the LoRA (54 gives 1 GB)")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of the checkpoint (60 is the whole)")
    parser.add_argument("--folder", type=Path, help="where to write the files (a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return run_case(args.case, args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        lora = write_lora(folder / "lora.safetensors", args.rank)
        checkpoint = write_checkpoint(folder / "base.safetensors", args.blocks)
        write_part(folder / "lora.safetensors", folder / "part.safetensors", args.blocks)
        for case, text in CASES.items():
            command = [sys.executable, __file__, "--case", case, "--folder", name]
            seconds, peak = map(float, subprocess.check_output(command, text=True).split())
            size = lora if case in ("merge", "resize") else checkpoint
            record(
                "lora_tools",
                f"{size / 1e9:.2f} GB, {text}",
                seconds,
                "s",
                peak_memory_gib=peak,
                path=args.results,
            )


def run_case(case: str, folder: Path) -> None:
    """Run one tool; writes seconds and peak memory in GiB."""
    lora, part, base = (folder / f"{name}.safetensors" for name in ("lora", "part", "base"))
    output = folder / f"{case}.safetensors"
    start = time.perf_counter()
    if case == "merge":
        merge_loras([(lora, 1.0), (lora, 0.5)], output)
    elif case == "resize":
        resize_lora(lora, output, RankRule(rank=16))
    elif case == "bake":
        bake_loras(base, [(part, 1.0)], output)
    else:
        extract_lora(base, folder / "bake.safetensors", output, RankRule(rank=32))
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB)


def write_checkpoint(path: Path, blocks: int) -> int:
    """Random weights N(0, 0.02) of true size; returns the bytes of the file."""
    shapes = {}
    for module in QWEN_IMAGE.linears(blocks):
        out, width = (_size(symbol) for symbol in QWEN_IMAGE.sizes(module) or ())
        shapes[f"{module}.weight"] = (out, width)
        shapes[f"{module}.bias"] = (out,)
    tensors = [
        derived(name, torch.bfloat16, shape, partial(_random, shape, index))
        for index, (name, shape) in enumerate(shapes.items())
    ]
    with replace_file(path) as temporary:
        stream_safetensors(temporary, tensors, {"format": "pt"})
    return path.stat().st_size


def write_part(source: Path, output: Path, blocks: int) -> None:
    """The updates of the first blocks, cut to rank 32 at most."""
    tensors: list[StoredTensor] = []
    for key, tensor in open_tensors(source, read_header(source)).items():
        number = key.removeprefix("lora_unet_transformer_blocks_").partition("_")[0]
        if not number.isdigit() or int(number) >= blocks:
            continue
        axis = 0 if "lora_down" in key else 1
        if key.endswith(".alpha"):
            tensors.append(tensor)
        else:
            shape = list(tensor.shape)
            shape[axis] = min(shape[axis], 32)
            tensors.append(derived(key, tensor.dtype, tuple(shape), partial(_cut, tensor, axis)))
    with replace_file(output) as temporary:
        stream_safetensors(temporary, tensors, {"format": "pt"})


def _cut(tensor: StoredTensor, axis: int) -> Tensor:
    return tensor.load().narrow(axis, 0, min(tensor.shape[axis], 32)).contiguous()


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def _size(symbol: str) -> int:
    factor, star, name = symbol.rpartition("*")
    size = int(name) if name.isdigit() else QWEN_IMAGE.published[name]
    return int(factor) * size if star else size


if __name__ == "__main__":
    main()
