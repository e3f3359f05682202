"""The difference of two checkpoints as a LoRA: module by module, nothing clamped, the error stated.

For each linear, tuned - base is computed in fp32 and cut to its leading singular values (`approximate.py`: a
randomised range finder for small ranks of large matrices, else the full decomposition). Weights are read and
released one at a time; in memory stay the factors that are found.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusers_qwenimage.checkpoint.reader import Checkpoint, open_checkpoint
from diffusers_qwenimage.checkpoint.recognise import find_components
from diffusers_qwenimage.checkpoint.scaled import ScaledCheckpoint, apply_scale, split_scales
from diffusers_qwenimage.lora.architectures import QWEN_IMAGE, QWEN_IMAGE_LAYERED
from diffusers_qwenimage.lora.compose import compose, write_composed
from diffusers_qwenimage.lora.render import Options
from diffusers_qwenimage.lora.resize import ModuleError, RankRule, Resized, resize_update
from diffusers_qwenimage.lora.updates import LoraUpdate, stored, unit_scale
from diffusers_qwenimage.lora.write import Progress


@dataclass(frozen=True, kw_only=True)
class Extracted(Resized):
    """An extracted LoRA; `left_out` names changed parameters that a LoRA cannot hold (biases, norms)."""

    num_unchanged: int
    left_out: tuple[str, ...]


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    rule: RankRule,
    *,
    to: str = "opensource",
    dtype: torch.dtype = torch.bfloat16,
    drop_others: bool = False,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Write the difference of two transformer checkpoints as a LoRA.

    Args:
        base, tuned: files, shards or folders of the same model; fp8 weights with scales are understood.
        output: the file to write, in the spelling of the target `to`.
        rule: how ranks are chosen.
        dtype: of the factors.
        drop_others: leave out changes of biases, norms and embeddings where the target has no keys for them.
        options: how far the target's spelling may go, see `Options`.
        progress: called with the bytes of `tuned` that were read.

    Raises:
        ValueError: if the checkpoints differ in their parameters, nothing changed, or a bias, norm or
            embedding changed that the target cannot hold (unless `drop_others`).
    """
    first, second = _transformer(base), _transformer(tuned)
    _check_same(first, second)
    updates: list[LoraUpdate] = []
    errors: list[ModuleError] = []
    num_unchanged, others = 0, []
    for name, old, new in _pairs(first, second):
        if progress:
            progress(new.numel() * new.dtype.itemsize)
        if old.dtype == new.dtype and torch.equal(old, new):
            num_unchanged += 1
            continue
        difference = new.float() - old.float()
        if not bool(torch.isfinite(difference).all()):
            raise ValueError(f"{name} holds NaN or infinity in one of the checkpoints.")
        if not bool(difference.any()):
            num_unchanged += 1
            continue
        if difference.ndim == 2 and _is_linear(name.removesuffix(".weight")):
            update, error = resize_update(_difference(name, difference), rule, dtype=dtype)
            updates.append(update)
            errors += [error] if error else []
        else:
            others.append((name, difference))
    kept, left_out = _others(others, to, drop_others)
    if not updates and not kept:
        raise ValueError(f"{tuned} does not differ from {base} in anything that a LoRA can hold.")
    conversion = write_composed(
        compose([*updates, *kept], name="the extracted LoRA", metadata={}),
        output,
        to,
        metadata={},
        options=options,
    )
    return Extracted(
        conversion=conversion, modules=tuple(errors), num_unchanged=num_unchanged, left_out=left_out
    )


def _others(
    others: list[tuple[str, Tensor]], to: str, drop: bool
) -> tuple[list[LoraUpdate], tuple[str, ...]]:
    """Changes of biases and norms as differences, for the target that holds these."""
    if to in ("comfyui", "comfy"):
        return [_difference(name, change) for name, change in others], ()
    names = tuple(name for name, _ in others)
    if names and not drop:
        raise ValueError(
            f"{len(names)} parameters changed that a LoRA of this target cannot hold ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}). Write the target comfyui, which holds differences, or "
            "leave them out (--drop-others)."
        )
    return [], names


def _difference(name: str, change: Tensor) -> LoraUpdate:
    stem, _, last = name.rpartition(".")
    bias = last == "bias"
    return LoraUpdate(
        module=stem,
        kind="diff_b" if bias else "diff",
        tensors={"diff_b" if bias else "diff": stored(name, change)},
        scale=unit_scale(),
        format="extracted",
    )


def _is_linear(module: str) -> bool:
    sizes = QWEN_IMAGE.sizes(module)
    return sizes is not None and len(sizes) == 2 and module not in QWEN_IMAGE_LAYERED.embeddings


def _transformer(source: str | Path) -> ScaledCheckpoint:
    path = Path(source)
    folder = path / "transformer"
    found = find_components(open_checkpoint(folder if folder.is_dir() else path))
    if "transformer" not in found:
        raise ValueError(f"{source} holds the {' and '.join(found)}, but not the transformer.")
    return split_scales(found["transformer"])


def _check_same(base: ScaledCheckpoint, tuned: ScaledCheckpoint) -> None:
    first, second = base.weights, tuned.weights
    different = sorted(set(first.tensors) ^ set(second.tensors))
    if different:
        raise ValueError(
            f"The checkpoints do not hold the same parameters: {len(different)} are in one only, such as "
            f"{different[0]}."
        )
    for name in first.tensors:
        if first.shape(name) != second.shape(name):
            raise ValueError(
                f"{name} has shape {first.shape(name)} in the base and {second.shape(name)} in the other "
                "checkpoint; they are of different models."
            )


def _pairs(base: ScaledCheckpoint, tuned: ScaledCheckpoint) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in tuned.weights.tensors:
        yield name, _read(base, name), _read(tuned, name)


def _read(checkpoint: ScaledCheckpoint, name: str) -> Tensor:
    weight = _one(checkpoint.weights, name)
    if name not in checkpoint.scales:
        return weight
    return apply_scale(weight, _one(Checkpoint(tensors=checkpoint.scales, metadata={}), name))


def _one(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for _, tensor in checkpoint.select([name]).read())
