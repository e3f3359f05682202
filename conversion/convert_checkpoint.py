"""Weights of a Qwen-Image component from one layout to another, one tensor in memory at a time.

    python conversion/convert_checkpoint.py INPUT OUTPUT --to LAYOUT [--component vae] [--dtype bf16]

INPUT is any layout that the package reads: a diffusers folder, shards, a single file, ComfyUI's all-in-one
files and scaled fp8, a checkpoint of full training by DiffSynth-Studio. LAYOUT is one of

    diffusers    a folder with config.json and diffusion_pytorch_model*.safetensors, sharded
    single       one file with the module's own key names, as DiffSynth-Studio trains and ComfyUI reads
    comfyui-fp8  one file, the linears of the blocks in float8_e4m3fn with one scale each, the rest in bf16

Without --dtype every tensor keeps its type and bits; scaled fp8 becomes bf16 (fp8 times scale, rounded once).
The output is read back and compared before it gets its name. For fp8 the error of the rounding is printed.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from diffusers_qwenimage.checkpoint import Checkpoint, ComponentName, read_component
from diffusers_qwenimage.checkpoint.config import ZERO_COND_MARKER
from diffusers_qwenimage.checkpoint.scaled import ScaledCheckpoint, apply_scale, split_scales
from diffusers_qwenimage.files import read_header, replace_file, write_text
from diffusers_qwenimage.lora.architectures import QWEN_IMAGE, relative_name
from diffusers_qwenimage.lora.read import TORCH_DTYPES, open_tensors
from diffusers_qwenimage.lora.updates import StoredTensor, equal_bits, stored
from diffusers_qwenimage.lora.write import stream_safetensors

LAYOUTS = ("diffusers", "single", "comfyui-fp8")
CLASSES = {"transformer": "QwenImageTransformer2DModel", "vae": "AutoencoderKLQwenImage"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = torch.float8_e4m3fn
MAX_SHARD_BYTES = 10**10  # what diffusers uses
WEIGHTS_NAME = "diffusion_pytorch_model"
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was written.

    Attributes:
        num_tensors, num_bytes: of the weights.
        num_changed: tensors whose type was changed.
        error: relative difference of all changed weights in the Frobenius norm; 0 where nothing rounded.
        worst_error, worst_tensor: the same for the tensor that differs most.
    """

    num_tensors: int
    num_bytes: int
    num_changed: int
    error: float
    worst_error: float
    worst_tensor: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code: 0 done, 2 refused or bad input (one line on stderr)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file or folder")
    parser.add_argument("output", type=Path, help="file to write; a folder for --to diffusers")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    parser.add_argument(
        "--component", choices=get_args(ComponentName), default="transformer", help="part to convert"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type to cast to (default: keep)")
    args = parser.parse_args(argv)
    try:
        with tqdm(unit="B", unit_scale=True, unit_divisor=1024, delay=1, disable=None, leave=False) as bar:
            result = convert_checkpoint(
                args.input,
                args.output,
                args.to,
                component=args.component,
                dtype=DTYPES.get(args.dtype),
                progress=lambda num_bytes: bar.update(num_bytes) and None,
            )
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    size = f"{result.num_tensors} tensors, {result.num_bytes / 2**30:.2f} GiB"
    print(f"{args.output}: {size}, read back and equal")
    if result.num_changed:
        print(
            f"{result.num_changed} tensors changed type; relative difference {result.error:.2e}, at most "
            f"{result.worst_error:.2e} ({result.worst_tensor})"
        )
    return 0


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    component: ComponentName = "transformer",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Result:
    """Write a component in another layout; see the top of this file.

    Raises:
        ValueError: if the input is not understood, or the layout cannot hold the component.
    """
    output = Path(output)
    config, part = read_component(source, component)
    if to != "single" and component not in CLASSES:
        raise ValueError(f"The {component} can be written as single only; its own library saves its folder.")
    if to == "comfyui-fp8" and component != "transformer":
        raise ValueError(f"ComfyUI's scaled fp8 is for the transformer, not for the {component}.")
    tensors, sources = plan(part, dtype=dtype)
    if to == "comfyui-fp8":
        tensors = quantised(tensors, zero_cond=bool(config.get("zero_cond_t")))
    if to == "diffusers":
        write_folder(output, config, CLASSES[component], tensors, max_shard_bytes, progress)
        files = sorted(output.glob("*.safetensors"))
    else:
        with replace_file(output) as temporary:
            stream_safetensors(temporary, tensors, {"format": "pt"}, progress=progress)
            check_written([temporary], tensors)
        files = [output]
    return measured(files, sources)


def plan(
    part: Checkpoint, *, dtype: torch.dtype | None
) -> tuple[list[StoredTensor], dict[str, StoredTensor]]:
    """The tensors to write and, by name, the tensors as the source means them (fp8 with its scale in
    fp32)."""
    scaled = split_scales(part)
    written, sources = [], {}
    for name, entry in scaled.weights.tensors.items():
        own = TORCH_DTYPES[entry.entry.dtype]
        has_scale = name in scaled.scales
        target = dtype or (torch.bfloat16 if has_scale else own)
        if not own.is_floating_point:
            target = own
        shape = entry.entry.shape
        meaning = torch.float32 if has_scale else own
        sources[name] = StoredTensor(
            key=name, dtype=meaning, shape=shape, load=partial(_load, scaled, name, meaning)
        )
        written.append(
            StoredTensor(key=name, dtype=target, shape=shape, load=partial(_load, scaled, name, target))
        )
    return written, sources


def quantised(tensors: Sequence[StoredTensor], *, zero_cond: bool) -> list[StoredTensor]:
    """The linears of the blocks as fp8 and a scale (the largest number becomes the largest of fp8), the rest
    bf16."""
    result = [stored("scaled_fp8", torch.zeros(2, dtype=FP8))]  # two elements: computed in full precision
    if zero_cond:
        result.append(stored(ZERO_COND_MARKER, torch.zeros(1)))
    for tensor in tensors:
        module, _, parameter = tensor.key.rpartition(".")
        if parameter == "weight" and relative_name(module) in QWEN_IMAGE.block_linears:
            result.append(
                StoredTensor(key=tensor.key, dtype=FP8, shape=tensor.shape, load=partial(_fp8_weight, tensor))
            )
            scale = StoredTensor(
                key=f"{module}.scale_weight", dtype=torch.float32, shape=(), load=partial(_fp8_scale, tensor)
            )
            result.append(scale)
        else:
            result.append(
                StoredTensor(
                    key=tensor.key,
                    dtype=torch.bfloat16,
                    shape=tensor.shape,
                    load=partial(_cast, tensor, torch.bfloat16),
                )
            )
    return result


def write_folder(
    output: Path,
    config: Mapping[str, object],
    class_name: str,
    tensors: Sequence[StoredTensor],
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    """Write config.json, the shards and their index into a new folder, which appears when all is there."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; name a new folder.")
    shards = into_shards(tensors, max_shard_bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.resolve().parent, prefix=f".{output.name}."))
    try:
        places = {}
        for number, shard in enumerate(shards, 1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            name = f"{WEIGHTS_NAME}{suffix}.safetensors"
            with replace_file(temporary / name) as path:
                stream_safetensors(path, shard, {"format": "pt"}, progress=progress)
                check_written([path], shard)
            places.update({tensor.key: name for tensor in shard})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
                "weight_map": dict(sorted(places.items())),
            }
            write_text(
                temporary / f"{WEIGHTS_NAME}.safetensors.index.json", json.dumps(index, indent=2) + "\n"
            )
        named = {"_class_name": class_name, "_diffusers_version": diffusers.__version__, **config}
        write_text(temporary / "config.json", json.dumps(named, indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def into_shards(tensors: Sequence[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    """Tensors in order, in groups of at most `max_bytes` (a larger tensor is a group of its own)."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def check_written(files: Sequence[Path], tensors: Sequence[StoredTensor]) -> None:
    """Read files back; raises ValueError if a tensor is missing or has other bits than it should have."""
    written = {key: tensor for file in files for key, tensor in open_tensors(file, read_header(file)).items()}
    expected = {tensor.key: tensor for tensor in tensors}
    if written.keys() != expected.keys():
        raise ValueError(
            "The written file does not hold the tensors that it should; the disk may be failing."
        )
    for key, tensor in expected.items():
        if not equal_bits(written[key].load(), tensor.load()):
            raise ValueError(
                f"{key} was written with other bits than it should have; the disk may be failing."
            )


def measured(files: Sequence[Path], sources: Mapping[str, StoredTensor]) -> Result:
    """Compare what was written with what the source means, where the type changed."""
    written = {key: tensor for file in files for key, tensor in open_tensors(file, read_header(file)).items()}
    difference = reference = worst = 0.0
    changed, worst_name = 0, ""
    for name, source in sources.items():
        if written[name].dtype == source.dtype:
            continue
        changed += 1
        before, after = source.load().double(), written[name].load().double()
        if f"{name.removesuffix('.weight')}.scale_weight" in written:
            after = after * written[f"{name.removesuffix('.weight')}.scale_weight"].load().double()
        error, norm = float((after - before).norm()), float(before.norm())
        difference, reference = difference + error**2, reference + norm**2
        if norm and error / norm > worst:
            worst, worst_name = error / norm, name
    return Result(
        num_tensors=len(written),
        num_bytes=sum(tensor.num_bytes for tensor in written.values()),
        num_changed=changed,
        error=(difference / reference) ** 0.5 if reference else 0.0,
        worst_error=worst,
        worst_tensor=worst_name,
    )


def _load(scaled: ScaledCheckpoint, name: str, dtype: torch.dtype) -> Tensor:
    weight = _one(scaled.weights, name)
    if name in scaled.scales:
        scale = Checkpoint(tensors={"scale": scaled.scales[name]}, metadata={})
        weight = apply_scale(weight, _one(scale, "scale"))
    return weight.to(dtype)


def _one(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(iter(checkpoint.select([name]).read()))[1]


def _fp8_scale(tensor: StoredTensor) -> Tensor:
    largest = tensor.load().float().abs().max()
    return torch.where(largest > 0, largest / torch.finfo(FP8).max, torch.ones(()))


def _fp8_weight(tensor: StoredTensor) -> Tensor:
    limit = torch.finfo(FP8).max
    return (tensor.load().float() / _fp8_scale(tensor)).clamp(-limit, limit).to(FP8)


def _cast(tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    return tensor.load().to(dtype)


if __name__ == "__main__":
    sys.exit(main())
