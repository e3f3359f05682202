"""A LoRA of 1 GB for the published model: convert and verify, time and peak memory of the process.

    python benchmarks/lora_convert.py [--rank 54] [--results FILE]

Each case runs in a process of its own, so that its peak is its own. All 846 linears, bf16, musubi-tuner's
spelling, alpha half the rank. "rename" keeps every tensor, "fold" multiplies the scale into a factor of each
module; both read the written file back and prove it equal before they rename it.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage.files import replace_file
from diffusers_qwenimage.lora.architectures import QWEN_IMAGE
from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.formats import KOHYA_FLAT
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.updates import StoredTensor
from diffusers_qwenimage.lora.verify import compare_files
from diffusers_qwenimage.lora.write import stream_safetensors

GIB = 2**30
CASES = {
    "rename": "convert and verify, kohya to opensource (rename)",
    "fold": "convert and verify, kohya to diffsynth (scale folded)",
    "original": "convert and verify, diffsynth back to the original bytes",
    "verify": "verify two files",
}


def main() -> None:
    """Write the file, then run each case in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=54, help="rank of every update (54 gives 1 GB)")
    parser.add_argument("--folder", type=Path, help="where to write the files (a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return run_case(args.case, args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_lora(Path(folder) / "source.safetensors", args.rank)
        for case, text in CASES.items():
            command = [sys.executable, __file__, "--case", case, "--folder", folder]
            seconds, peak = map(float, subprocess.check_output(command, text=True).split())
            name = f"{size / 1e9:.2f} GB, {text}"
            record("lora_convert", name, seconds, "s", peak_memory_gib=peak, path=args.results)
            print(f"{'':12s} peak memory {peak * GIB / size:.2f} x the file")


def run_case(case: str, folder: Path) -> None:
    """Do one conversion or comparison; writes seconds and peak memory in GiB."""
    files = {name: folder / f"{name}.safetensors" for name in ("source", *CASES)}
    start = time.perf_counter()
    if case == "verify":
        assert compare_files(read_lora(files["source"]), read_lora(files["rename"])).exact
    else:
        source = files["fold"] if case == "original" else files["source"]
        target = {"rename": "opensource", "fold": "diffsynth", "original": "original"}[case]
        assert convert_lora(source, files[case], target).comparison.exact
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(seconds, peak)


def write_lora(path: Path, rank: int) -> int:
    """Write random factors for all linears; returns the bytes of the file."""
    published = QWEN_IMAGE.published
    sizes = {"hidden": 3072, "text": published["text"], "latent": published["latent"], "patch": 64}

    def size(symbol: str) -> int:
        factor, _, name = symbol.rpartition("*")
        return int(name) if name.isdigit() else int(factor or 1) * sizes[name]

    tensors = []
    for module in QWEN_IMAGE.linears():
        shape = QWEN_IMAGE.sizes(module)
        assert shape is not None
        out, width = map(size, shape)
        for role, dimensions in (("down", (rank, width)), ("up", (out, rank))):
            tensors.append(random_tensor(KOHYA_FLAT.render(module, role), dimensions))
        alpha = torch.tensor(rank / 2)
        tensors.append(
            StoredTensor(
                key=KOHYA_FLAT.render(module, "alpha"), dtype=alpha.dtype, shape=(), load=lambda a=alpha: a
            )
        )
    with replace_file(path) as temporary:
        stream_safetensors(temporary, tensors, {"format": "pt", "ss_network_dim": str(rank)})
    return path.stat().st_size


def random_tensor(key: str, shape: tuple[int, int]) -> StoredTensor:
    """A tensor that is drawn when it is written."""

    def draw() -> Tensor:
        return (torch.randn(shape) * 0.02).to(torch.bfloat16)

    return StoredTensor(key=key, dtype=torch.bfloat16, shape=shape, load=draw)


if __name__ == "__main__":
    main()
