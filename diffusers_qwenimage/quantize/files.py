"""Checkpoints in 8 bits: made from others tensor by tensor, loaded and saved as one file."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusers_qwenimage.checkpoint import Checkpoint, from_tensors, read_component
from diffusers_qwenimage.checkpoint.assign import check_fits, empty_module
from diffusers_qwenimage.checkpoint.reader import DTYPE_NAMES, DTYPES, INDEX_SUFFIX, StoredTensor, quote
from diffusers_qwenimage.checkpoint.scaled import FLOAT8, ScaledCheckpoint, split_scales
from diffusers_qwenimage.files import write_safetensors_in_turn, write_text

from .apply import SKIPPED, quantize_
from .layers import QuantizedLinear
from .stored import comfyui_shapes, comfyui_tensors, quantize_layers_, record_of, stored_weight

STEM = "diffusion_pytorch_model"
GIGABYTE = 10**9
Module = TypeVar("Module", bound=nn.Module)


def quantize_checkpoint(
    model_class: type[nn.Module],
    source: str | Path | Sequence[str | Path],
    target: str | Path,
    kind: str,
    *,
    skip: Sequence[str] = SKIPPED,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    max_shard_size: int = 5 * GIGABYTE,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a transformer's checkpoint in 8 bits without ever holding more than one of its tensors.

    Args:
        model_class: `QwenImageTransformer2DModel`.
        source: folder, file or shards; the config is taken from `config.json` there or told by the shapes.
        target: a folder for `from_pretrained`, or a path that ends in ".safetensors" for one file with
            ComfyUI's keys.
        kind, skip: as in `quantize_`.
        dtype: of everything that is not quantised.
        device: where the weights are quantised.
        max_shard_size: bytes of a shard in a folder.
        progress: called with (bytes written, bytes in all).

    Returns:
        Names of the quantised layers.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the source is no complete transformer, or there is no such kind.
    """
    settings, part = read_component(source, "transformer")
    module = _empty(model_class, settings)
    names = quantize_(module, kind, skip=skip)
    work = _Work(module, split_scales(part), dtype, torch.device(device))
    check_fits(module, work.scaled.weights, optional=work.made_here())
    target = Path(target)
    single = target.suffix == ".safetensors"
    plan = work.plan(single=single)
    total, done = sum(tensor.num_bytes for tensor in plan), 0

    def counted(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for name, tensor in tensors:
            yield name, tensor
            done += tensor.numel() * tensor.element_size()
            if progress is not None:
                progress(done, total)

    if single:
        entries = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan}
        write_safetensors_in_turn(target, entries, counted(work.tensors(plan, single=True)))
        return names
    shards = _shards(plan, max_shard_size)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = target / f"{STEM}{suffix}.safetensors"
        entries = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard}
        write_safetensors_in_turn(file, entries, counted(work.tensors(shard, single=False)), {"format": "pt"})
        index |= dict.fromkeys(entries, file.name)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_text(target / f"{STEM}{INDEX_SUFFIX}", json.dumps(content, indent=2, sort_keys=True) + "\n")
    config = {**settings, "quantization_config": record_of(module)}
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return names


def load_quantized(
    model_class: type[Module],
    source: str | Path | Mapping[str, Tensor],
    kind: str,
    *,
    config: Mapping[str, Any] | None = None,
    skip: Sequence[str] = SKIPPED,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> Module:
    """A transformer from one file, with layers of this kind.

    Of a file in 8 bits, the layers that it holds in 8 bits are taken as they are stored if the kind allows
    that (fp8 with one scale or one per row for "fp8" and "fp8-storage"; int8, rotated as ours, for "int8"),
    and quantised anew if not; its other layers stay in `dtype`. Of any other file, all layers but those of
    `skip` are quantised. One weight at a time is in memory beside the result.

    Raises:
        FileNotFoundError, ValueError: as `load_transformer_file`.
    """
    opened = from_tensors(source) if isinstance(source, Mapping) else source
    settings, part = read_component(opened, "transformer", config=config)
    scaled = split_scales(part)
    module = _empty(model_class, settings)
    stored = [
        name.removesuffix(".weight")
        for name, tensor in scaled.weights.tensors.items()
        if name in scaled.scales or tensor.entry.dtype in FLOAT8
    ]
    if stored:
        quantize_layers_(module, {kind: stored})
    else:
        quantize_(module, kind, skip=skip)
    work = _Work(module, scaled, dtype, torch.device(device))
    check_fits(module, scaled.weights, optional=work.made_here())
    state = dict(work.tensors(work.plan(single=False), single=False))
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device).eval().requires_grad_(False)


def write_single_file(module: nn.Module, path: str | Path) -> None:
    """Write a transformer as one safetensors file, its quantised layers in ComfyUI's convention.

    Raises:
        ValueError: if adapters are attached; their weights have no place in such a file.
    """
    adapters = [name for name, _ in module.named_parameters() if ".lora_" in name]
    if adapters:
        raise ValueError(f"A LoRA is attached ({quote(adapters, limit=1)}); unload it, then save.")
    layers = _quantized(module)
    rest = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    entries = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in rest.items()}
    for name, layer in layers.items():
        shapes = comfyui_shapes(name, layer)
        entries |= {key: (DTYPE_NAMES[dtype], shape) for key, (dtype, shape) in shapes.items()}

    def in_turn() -> Iterator[tuple[str, Tensor]]:
        yield from rest.items()
        for name, layer in layers.items():
            yield from comfyui_tensors(name, layer, layer.weight, layer.weight_scale)

    write_safetensors_in_turn(path, entries, in_turn())


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A tensor that will be written.

    Attributes:
        name, dtype, shape: in the new file.
        source: the stored tensor that it is made of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class _Work:
    """Stored tensors as those of a module with quantised layers, on the meta device."""

    def __init__(
        self, module: nn.Module, scaled: ScaledCheckpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers = _quantized(module)
        for layer in self._layers.values():
            layer.compute_dtype = dtype
        self.scaled = scaled
        self._dtype = dtype
        self._device = device

    def made_here(self) -> set[str]:
        """Names that no file needs to hold."""
        return {f"{name}.weight_scale" for name in self._layers}

    def plan(self, *, single: bool) -> list[_Planned]:
        """All tensors of the result, each layer's together."""
        result = []
        for name, stored in self.scaled.weights.tensors.items():
            for key, (dtype, shape) in self._shapes(name, stored, single=single).items():
                result.append(_Planned(name=key, dtype=dtype, shape=shape, source=name))
        return result

    def _shapes(
        self, name: str, stored: StoredTensor, *, single: bool
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        layer, owner = self._layer(name)
        if layer is None:
            is_float = DTYPES[stored.entry.dtype].is_floating_point
            return {name: (DTYPE_NAMES[self._dtype] if is_float else stored.entry.dtype, stored.entry.shape)}
        if single:
            shapes = comfyui_shapes(owner, layer)
            return {key: (DTYPE_NAMES[dtype], shape) for key, (dtype, shape) in shapes.items()}
        return {
            f"{owner}.{key}": (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for key, tensor in (("weight", layer.weight), ("weight_scale", layer.weight_scale))
        }

    @torch.no_grad()
    def tensors(self, plan: Sequence[_Planned], *, single: bool) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the plan, in its order."""
        made: dict[str, Tensor] = {}
        for planned in plan:
            if planned.name not in made:
                made = dict(self._made_of(planned.source, single=single))
            yield planned.name, made.pop(planned.name)

    def _made_of(self, name: str, *, single: bool) -> Iterator[tuple[str, Tensor]]:
        stored = _read(self.scaled.weights, name).to(self._device)
        layer, owner = self._layer(name)
        if layer is None:
            yield name, stored.to(self._dtype) if stored.is_floating_point() else stored
            return
        scale = None
        if name in self.scaled.scales:
            scales = Checkpoint(tensors=self.scaled.scales, metadata={})
            scale = _read(scales, name).to(self._device)
        weight, scale = stored_weight(layer, stored, scale, self.scaled.rotations.get(name, 0))
        if single:
            yield from comfyui_tensors(owner, layer, weight, scale)
        else:
            yield f"{owner}.weight", weight
            yield f"{owner}.weight_scale", scale

    def _layer(self, name: str) -> tuple[QuantizedLinear | None, str]:
        """The quantised layer that this is the weight of, and its name."""
        owner, _, attribute = name.rpartition(".")
        return (self._layers.get(owner) if attribute == "weight" else None), owner


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return next(tensor for _, tensor in checkpoint.select([name]).read())


def _quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantizedLinear)}


def _empty(model_class: type[Module], settings: Mapping[str, Any]) -> Module:
    builder: Any = model_class  # a ConfigMixin
    module: Module = empty_module(lambda: builder.from_config(dict(settings)))
    return module


def _shards(plan: Sequence[_Planned], max_shard_size: int) -> list[list[_Planned]]:
    """The plan cut where a shard would be too large; tensors of one source stay together."""
    shards: list[list[_Planned]] = [[]]
    size = 0
    for index, tensor in enumerate(plan):
        starts = index == 0 or plan[index - 1].source != tensor.source
        group = sum(other.num_bytes for other in plan[index : index + 4] if other.source == tensor.source)
        if shards[-1] and starts and size + group > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
