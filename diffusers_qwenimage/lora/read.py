"""Reading a LoRA file of any format: keys -> `LoraUpdate`s, with everything that does not fit listed as a
problem.

Only the header and the alphas are read here; the other tensors are read when somebody asks for them. A file
with a problem is refused by `read_lora` (nothing is skipped); reports and repairs use `parse_lora`, which
keeps the list.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusers_qwenimage.files import SafetensorsHeader, TensorEntry, read_header
from diffusers_qwenimage.lora.architectures import (
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    Architecture,
    detect_architecture,
    infer_dimensions,
)
from diffusers_qwenimage.lora.formats import FORMATS, Format, ParsedKey, format_of, parse_key
from diffusers_qwenimage.lora.grouping import Module, updates_of_module
from diffusers_qwenimage.lora.scales import ScaleRules, scale_rules
from diffusers_qwenimage.lora.updates import LoraUpdate, StoredTensor, stored

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
NUM_LISTED = 5  # problems that a message lists
MAX_ALPHA_BYTES = 1024  # an alpha is a number; anything larger is not read as one

# Parts of keys that other models' LoRAs have and those of Qwen-Image have not.
OTHER_MODELS = {
    "double_blocks": "FLUX or HunyuanVideo",
    "single_transformer_blocks": "FLUX",
    "single_blocks": "FLUX or HunyuanVideo",
    "joint_blocks": "Stable Diffusion 3",
    "down_blocks": "Stable Diffusion or SDXL",
    "input_blocks": "Stable Diffusion or SDXL",
    "self_attn_q.": "Wan",
    "self_attn.q.": "Wan",
}

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file as its updates.

    Attributes:
        name: where it came from, for messages.
        updates: one per module and kind, in the order of the file.
        architecture: what the modules belong to.
        dimensions: the sizes that the shapes imply: hidden, depth, text, ...
        formats: number of keys per format name.
        metadata: the metadata of the file, as it is.
        adapter_config: the parsed adapter_config.json of a PEFT folder.
        tensors: every tensor of the file by its key, in the order of the file.
        problems: what makes the file unusable as it is; `read_lora` refuses a file with any.
        notes: what is worth knowing.
    """

    name: str
    updates: tuple[LoraUpdate, ...]
    architecture: Architecture
    dimensions: Mapping[str, int]
    formats: Mapping[str, int]
    metadata: Mapping[str, str]
    adapter_config: Mapping[str, object] | None
    tensors: Mapping[str, StoredTensor]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def read_lora(path: str | Path, *, base: str | Path | None = None) -> LoraFile:
    """Read a LoRA file or a PEFT adapter folder; the tensors stay on the disk.

    Args:
        path: a .safetensors file, or a folder with adapter_model.safetensors and adapter_config.json.
        base: a checkpoint (file or folder) to check the shapes against, instead of the sizes the
            file implies.

    Raises:
        ValueError: if anything in the file is not understood or contradicts itself; the first few are listed.
    """
    return checked(parse_lora(path, base=base))


def read_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping[str, object] | None = None,
    name: str = "the state dict",
) -> LoraFile:
    """The same as `read_lora` for tensors in memory."""
    wrapped = {key: stored(key, tensor) for key, tensor in tensors.items()}
    return checked(parse_tensors(wrapped, name=name, metadata=metadata, adapter_config=adapter_config))


def checked(file: LoraFile) -> LoraFile:
    """Return the file if it has no problem; raise a ValueError that lists the first ones otherwise."""
    if file.architecture is QWEN_IMAGE_21:
        raise ValueError(
            f"{file.name} is a LoRA of Qwen-Image 2.1, a different model: its modules (img_mlp.proj, "
            "txt_in.in_layer, modulation.1) do not exist in Qwen-Image. Use diffusers' "
            "own Qwen-Image 2.1 pipeline for it."
        )
    if file.problems:
        raise ValueError(f"{file.name} cannot be used: {listing(file.problems)}.")
    return file


def listing(problems: tuple[str, ...] | list[str]) -> str:
    """The first few problems in one line, with the number of those left out."""
    left = len(problems) - NUM_LISTED
    return "; ".join(problems[:NUM_LISTED]) + (f"; and {left} more" if left > 0 else "")


def parse_lora(path: str | Path, *, base: str | Path | None = None) -> LoraFile:
    """Like `read_lora`, but problems are returned with the file instead of raised."""
    path = Path(path)
    weights = path / ADAPTER_MODEL if path.is_dir() else path
    if path.is_dir() and not weights.is_file():
        raise ValueError(f"{path} is a folder without {ADAPTER_MODEL}; name a file or a PEFT adapter folder.")
    header = read_header(weights)
    config = None
    if weights.name == ADAPTER_MODEL and (weights.parent / ADAPTER_CONFIG).is_file():
        config = read_adapter_config(weights.parent / ADAPTER_CONFIG)
    return parse_tensors(
        open_tensors(weights, header),
        name=str(path),
        metadata=header.metadata,
        adapter_config=config,
        base_shapes=base_shapes(base) if base is not None else None,
    )


def parse_header_only(header: SafetensorsHeader, *, name: str) -> LoraFile:
    """What the header alone tells of a file that was not fetched; scales in the data stay unknown."""
    tensors = {
        key: StoredTensor(key=key, dtype=_dtype(key, entry), shape=entry.shape, load=_no_data)
        for key, entry in header.tensors.items()
    }
    return parse_tensors(tensors, name=name, metadata=header.metadata, read_values=False)


def parse_tensors(
    tensors: Mapping[str, StoredTensor],
    *,
    name: str,
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping[str, object] | None = None,
    base_shapes: Mapping[str, tuple[int, ...]] | None = None,
    read_values: bool = True,
) -> LoraFile:
    """Turn keys and lazily read tensors into updates."""
    metadata = dict(metadata or {})
    problems: list[str] = []
    rules = scale_rules(metadata, adapter_config, problems)
    modules = _group(tensors, problems)
    updates: list[LoraUpdate] = []
    for module in modules:
        updates += updates_of_module(module, rules, problems, read_values=read_values)
    architecture = detect_architecture((u.module for u in updates if u.component == "transformer"), metadata)
    problems += _fused_twice(updates, architecture)
    dimensions, misfits = _check_shapes(updates, architecture, base_shapes)
    if not tensors:
        problems.append("it holds no tensors")
    return LoraFile(
        name=name,
        updates=tuple(updates),
        architecture=architecture,
        dimensions=dimensions,
        formats=_count_formats(modules),
        metadata=metadata,
        adapter_config=adapter_config,
        tensors=tensors,
        problems=tuple(problems + misfits),
        notes=_notes(modules, updates, rules),
    )


def open_tensors(path: Path, header: SafetensorsHeader) -> dict[str, StoredTensor]:
    """The tensors of a file, each read from its place when asked for; the file is not kept open."""
    return {
        key: StoredTensor(
            key=key, dtype=_dtype(key, entry), shape=entry.shape, load=_reader(path, header.data_start, entry)
        )
        for key, entry in header.tensors.items()
    }


def read_adapter_config(path: Path) -> dict[str, object]:
    """Parse an adapter_config.json; raises ValueError if it is not a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def base_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a checkpoint, by their diffusers names, from its headers alone.

    Raises:
        ValueError: if there is no safetensors file, or one is damaged.
    """
    path = Path(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [path]
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file.")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for key, entry in read_header(file).tensors.items():
            for prefix in ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer."):
                key = key.removeprefix(prefix)
            shapes[key] = entry.shape
    return shapes


def _group(tensors: Mapping[str, StoredTensor], problems: list[str]) -> list[Module]:
    """Sort the tensors by module and role; unknown keys and double roles become problems."""
    modules: dict[tuple[str, str], Module] = {}
    for key, tensor in tensors.items():
        found = parse_key(key)
        if found is None:
            problems.append(_unknown(key))
            continue
        format_, parsed = found
        module = modules.setdefault(
            (parsed.component, parsed.module),
            Module(path=parsed.module, component=parsed.component, tensors={}, formats={}),
        )
        if parsed.role in module.tensors:
            problems.append(f"{key} and {module.tensors[parsed.role].key} are the same tensor of one module")
            continue
        module.tensors[parsed.role] = tensor
        module.formats[parsed.role] = (format_, parsed)
    if tensors and not modules:
        problems.insert(0, _foreign(tensors))
    return list(modules.values())


def _foreign(keys: Iterable[str]) -> str:
    """What a file is that has no key of a LoRA for Qwen-Image."""
    adapters = [key for key in keys if any(mark in key for mark in ("lora", "lokr", "hada"))]
    for part, model in OTHER_MODELS.items():
        if any(part in key for key in adapters):
            return f"it is a LoRA of another model ({model}), not of Qwen-Image"
    if adapters:
        return "none of its keys is one of a LoRA for Qwen-Image"
    return "it is no LoRA"


def _unknown(key: str) -> str:
    stem = key.removesuffix(".weight").removesuffix(".bias")
    if stem != key and QWEN_IMAGE.sizes(stem) is not None:
        return f"{key!r} is a weight of a full checkpoint, not of a LoRA"
    return f"unknown key {key[:200]!r}"


def _format_of_module(module: Module) -> Format:
    """The format of the factors where there are any: other keys do not show the spelling."""
    for role in ("down", "up", "embedding_down"):
        if role in module.formats:
            return module.formats[role][0]
    return next(iter(module.formats.values()))[0]


def _count_formats(modules: list[Module]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for module in modules:
        main = _format_of_module(module)
        for format_, parsed in module.formats.values():
            counts[_own_format(format_, parsed, main).name] += 1
    return dict(counts)


def _own_format(format_: Format, parsed: ParsedKey, main: Format) -> Format:
    if parsed.spelling is not None:
        return format_of(parsed.prefix, parsed.spelling) or format_
    return main if main.prefix == parsed.prefix else format_


def _fused_twice(updates: list[LoraUpdate], architecture: Architecture) -> list[str]:
    changed = {update.module for update in updates if update.component == "transformer"}
    return [
        f"{module} and {part} are both changed, and the one is a part of the other"
        for module in sorted(changed)
        for part in architecture.parts(module) or ()
        if part in changed
    ]


def _check_shapes(
    updates: list[LoraUpdate], architecture: Architecture, base: Mapping[str, tuple[int, ...]] | None
) -> tuple[dict[str, int], list[str]]:
    listed = [(u.module, u.shape) for u in updates if u.component == "transformer" and u.shape is not None]
    dimensions, problems = infer_dimensions(architecture, listed)
    if base is None:
        return dimensions, problems
    problems = []
    for update in updates:
        parameter = f"{update.module}.{'bias' if update.kind == 'diff_b' else 'weight'}"
        if update.component != "transformer" or architecture.parts(update.module):
            continue
        if parameter not in base:
            problems.append(f"{parameter} does not exist in the base checkpoint")
        elif update.shape is not None and tuple(update.shape) != tuple(base[parameter]):
            problems.append(
                f"{update.module}: a change of shape {list(update.shape)} for a parameter of shape "
                f"{list(base[parameter])}"
            )
    return dimensions, problems


def _notes(modules: list[Module], updates: list[LoraUpdate], rules: ScaleRules) -> tuple[str, ...]:
    names = _count_formats(modules)
    notes = [
        f"{count} keys are damaged: {format_.damage}"
        for format_ in FORMATS
        if format_.damage and (count := names.get(format_.name, 0))
    ]
    if len({update.scale.source for update in updates}) > 1:
        notes.append("the scale comes from different places in different modules")
    return (*notes, *rules.notes)


def _reader(path: Path, data_start: int, entry: TensorEntry) -> Callable[[], Tensor]:
    def load() -> Tensor:
        if entry.end == entry.start:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        buffer = bytearray(entry.end - entry.start)
        with path.open("rb") as file:
            file.seek(data_start + entry.start)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{path} ended while it was read; it was changed or truncated.")
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)

    return load


def _dtype(key: str, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in TORCH_DTYPES:
        raise ValueError(f"{key} has the type {entry.dtype}, which PyTorch cannot hold.")
    return TORCH_DTYPES[entry.dtype]


def _no_data() -> Tensor:
    raise ValueError("Only the header of this file was read; fetch the file to get its tensors.")
