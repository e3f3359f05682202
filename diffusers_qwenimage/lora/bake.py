"""LoRAs into the weights of a checkpoint: tensor by tensor, summed in fp32, written in the checkpoint's type.

The layout stays: a file gives a file, a folder of shards gives a folder with the same shards, index and
configuration, and keys keep the names they had (diffusers, ComfyUI or DiffSynth). Memory holds one weight at
a time. What rounding to the type of the checkpoint costs is measured and reported: in bf16 a small change of
a large weight loses a visible part of itself, which is why fp8 checkpoints are refused.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffusers_qwenimage.checkpoint.reader import INDEX_SUFFIX, open_checkpoint, weight_files
from diffusers_qwenimage.checkpoint.recognise import find_components
from diffusers_qwenimage.checkpoint.scaled import FLOATS
from diffusers_qwenimage.files import read_header, replace_file, sync
from diffusers_qwenimage.lora.apply import changed_weight
from diffusers_qwenimage.lora.factors import derived
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.metadata import HASH_KEYS
from diffusers_qwenimage.lora.read import listing, open_tensors, read_lora
from diffusers_qwenimage.lora.updates import LoraUpdate, StoredTensor
from diffusers_qwenimage.lora.write import Progress, stream_safetensors

PIECE = 1 << 20  # elements
BAKE_KEY = "diffusers_qwenimage.baked"  # metadata: what was baked in
Weighted = tuple[LoraUpdate, float]


@dataclass(frozen=True, kw_only=True)
class Baked:
    """What was written.

    Attributes:
        num_changed: parameters that changed.
        num_tensors: tensors of the checkpoint.
        num_bytes: size of the weights.
        relative_rounding: |rounding to the checkpoint's type| / |change| over all changed parameters.
    """

    num_changed: int
    num_tensors: int
    num_bytes: int
    relative_rounding: float


@dataclass(kw_only=True)
class _Rounding:
    """Squared norms, collected while weights are written."""

    error: float = 0.0
    change: float = 0.0
    changed: set[str] = field(default_factory=set)


def bake_loras(
    checkpoint: str | Path,
    loras: Sequence[tuple[str | Path, float]],
    output: str | Path,
    *,
    progress: Progress | None = None,
) -> Baked:
    """Write a checkpoint with LoRAs in its weights.

    Args:
        checkpoint: a file of the transformer, or a folder with its file or shards.
        loras: (file, strength) pairs, of any format and kind that needs no more than the weight it changes.
        output: a file for a file, a new folder for a folder.
        progress: called with the bytes written.

    Raises:
        ValueError: if a LoRA does not fit the checkpoint, the checkpoint is quantised, or the output exists
            as a folder. Nothing is left at `output` then.
    """
    source, output = Path(checkpoint), Path(output)
    if (source / "transformer").is_dir():
        raise ValueError(f"{source} is a whole pipeline; name its folder {source / 'transformer'}.")
    if source.resolve() == output.resolve():
        raise ValueError(f"{output} is the input; name another.")
    files = weight_files(source)
    names = _names(source)
    changes = _changes(loras, names)
    record = json.dumps([{"name": Path(path).name, "strength": strength} for path, strength in loras])
    rounding, num_bytes, num_tensors = _Rounding(), 0, 0
    with _outputs(source, output) as target:
        for file in files:
            path = target / file.name if source.is_dir() else target
            header = read_header(file)
            kept = {key: value for key, value in header.metadata.items() if key not in HASH_KEYS}
            keys = {key: name for (owner, key), name in names.items() if owner == file}
            tensors = [
                _baked(tensor, keys.get(key, ""), changes, rounding)
                for key, tensor in open_tensors(file, header).items()
            ]
            stream_safetensors(path, tensors, {**kept, BAKE_KEY: record}, progress=progress)
            if source.is_dir():
                sync(path)
            num_bytes += path.stat().st_size
            num_tensors += len(tensors)
    lost = (rounding.error / rounding.change) ** 0.5 if rounding.change else 0.0
    return Baked(
        num_changed=len(rounding.changed),
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        relative_rounding=lost,
    )


def _names(source: Path) -> dict[tuple[Path, str], str]:
    """(file, key) -> the parameter's name in the transformer."""
    checkpoint = open_checkpoint(source)
    found = find_components(checkpoint)
    if "transformer" not in found:
        raise ValueError(f"{source} holds the {' and '.join(found)}, but not the transformer.")
    part = found["transformer"]
    odd = sorted({t.entry.dtype for t in part.tensors.values() if t.entry.dtype not in FLOATS})
    if odd:
        raise ValueError(
            f"{source} is quantised ({', '.join(odd)}). The change of a LoRA is smaller than the steps of "
            "such a type; bake it into the bf16 checkpoint and quantise that."
        )
    return {(tensor.file, tensor.key): name for name, tensor in part.tensors.items()}


def _changes(
    loras: Sequence[tuple[str | Path, float]], names: Mapping[tuple[Path, str], str]
) -> dict[str, list[Weighted]]:
    """Parameter -> the updates that change it, in the order of the files."""
    parameters = set(names.values())
    changes: dict[str, list[Weighted]] = {}
    problems: list[str] = []
    for path, strength in loras:
        file = read_lora(path)
        for update in split_all(file.updates, file.architecture):
            name = f"{update.module}.{'bias' if update.kind == 'diff_b' else 'weight'}"
            if update.component != "transformer":
                problems.append(f"{update.module} belongs to the text encoder")
            elif name not in parameters:
                problems.append(f"{name} does not exist there")
            elif update.kind not in ("lora", "dora", "lokr", "loha", "diff", "diff_b", "embedding"):
                problems.append(f"{update.kind} of {update.module} is not known how to apply")
            elif "up_bias" in update.tensors:
                problems.append(f"the bias of the up factor of {update.module} has no place in a weight")
            else:
                changes.setdefault(name, []).append((update, strength))
    if problems:
        raise ValueError(f"The LoRA cannot be baked in: {listing(problems)}.")
    return changes


def _baked(
    tensor: StoredTensor, name: str, changes: Mapping[str, Sequence[Weighted]], rounding: _Rounding
) -> StoredTensor:
    weighted = changes.get(name)
    if not weighted:
        return tensor

    def load() -> Tensor:
        base = tensor.load()
        changed = base
        for update, strength in weighted:
            changed = changed_weight(changed, update, strength)
        rounded = changed.to(base.dtype)
        rounding.error += _squared_distance(rounded, changed)
        rounding.change += _squared_distance(changed, base)
        rounding.changed.add(name)
        return rounded

    return derived(tensor.key, tensor.dtype, tensor.shape, load)


def _squared_distance(first: Tensor, second: Tensor) -> float:
    """|first - second|^2 in pieces: temporaries as large as the weight would cost most of the time."""
    pieces = zip(first.reshape(-1).split(PIECE), second.reshape(-1).split(PIECE), strict=True)
    return sum(float(torch.linalg.vector_norm(one.float() - two.float())) ** 2 for one, two in pieces)


@contextmanager
def _outputs(source: Path, output: Path) -> Iterator[Path]:
    """Yield where to write; it gets its name only on success. A folder starts with what is no weight."""
    if not source.is_dir():
        with replace_file(output) as temporary:
            yield temporary
        return
    if output.exists():
        raise ValueError(f"{output} exists; name a new folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.resolve().parent, prefix=f".{output.name}."))
    temporary.chmod(0o755)
    try:
        for path in source.iterdir():
            if path.is_file() and (path.suffix != ".safetensors" or path.name.endswith(INDEX_SUFFIX)):
                shutil.copyfile(path, temporary / path.name)
        yield temporary
        os.replace(temporary, output)
        sync(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
