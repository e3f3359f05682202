"""The models of a run: found, checked by the headers of their files before any weight is read, loaded."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_qwenimage.checkpoint import Checkpoint, ComponentName, find_components, open_checkpoint
from diffusers_qwenimage.files import read_header
from diffusers_qwenimage.loading import (
    default_checkpoint,
    find_files,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)

from .config import TrainConfig, comma_list
from .hashing import digest_of

logger = logging.getLogger(__name__)

PUBLISHED = "Qwen/Qwen-Image"
MODELS_FOLDER = "./models"  # where DiffSynth-Studio keeps downloads
COMPONENTS: Mapping[str, ComponentName] = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
SAMPLED_BYTES = 65_536  # of each tensor, for a checkpoint's fingerprint


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The opened (unread) checkpoints of a run, and where its tokenizer and scheduler are.

    Attributes:
        parts: by component; with the transformer always.
        tokenizer: folder.
        scheduler: folder, or None for the published settings.
        name: of the base model, for the model card.
    """

    parts: Mapping[ComponentName, Checkpoint]
    tokenizer: Path
    scheduler: Path | None
    name: str

    def load(self, component: ComponentName, dtype: torch.dtype, device: torch.device) -> Any:
        """One model, frozen, in evaluation mode."""
        loader: Any = {
            "transformer": load_transformer,
            "text_encoder": load_text_encoder,
            "vae": load_vae,
        }[component]
        return loader(self.parts[component], dtype=dtype, device=device).requires_grad_(False)

    def load_tokenizer(self) -> Any:
        """The checked tokenizer."""
        return load_tokenizer(self.tokenizer)

    def load_scheduler(self) -> Any:
        """A scheduler for validation pictures."""
        return load_scheduler(self.scheduler)

    def fingerprint(self, component: ComponentName) -> str:
        """A hash of a model's header and of the first 64 KiB of each tensor: any fine-tuning changes it, and
        it costs a second instead of the minute that hashing 16 GB takes."""
        parts: list[object] = []
        for file in self.parts[component].files:
            header = read_header(file)
            with file.open("rb") as opened:
                for key, entry in sorted(header.tensors.items()):
                    opened.seek(header.data_start + entry.start)
                    start = opened.read(min(SAMPLED_BYTES, entry.end - entry.start))
                    parts += [key, entry.dtype, entry.shape, start]
        return digest_of(*parts)


def find_models(config: TrainConfig) -> ModelFiles:
    """Find (and download) the files of all models, and check that they hold what the run needs.

    Raises:
        FileNotFoundError: if a file is missing.
        DownloadError: if a hub cannot deliver it.
        ValueError: if a file is not recognised, a model is missing or comes twice, or the target modules
            match nothing.
    """
    sources, name = _sources(config)
    parts: dict[ComponentName, Checkpoint] = {}
    for source in sources:
        for component, part in find_components(open_checkpoint(source)).items():
            if component in parts:
                raise ValueError(
                    f"The {component} comes twice: from {parts[component].files[0]} and from "
                    f"{part.files[0]}. Put the files of one model into a nested list."
                )
            parts[component] = part
    _check_complete(parts)
    if config.is_lora:
        check_targets(parts["transformer"], comma_list(config.lora_target_modules))
    tokenizer = _tokenizer(config, parts)
    scheduler = parts["transformer"].files[0].parent.parent / "scheduler"
    return ModelFiles(
        parts=parts,
        tokenizer=tokenizer,
        scheduler=scheduler if (scheduler / "scheduler_config.json").is_file() else None,
        name=name,
    )


def check_targets(transformer: Checkpoint, targets: Sequence[str]) -> list[str]:
    """Names of the layers that get a LoRA.

    Raises:
        ValueError: if a target is the end of no layer's name.
    """
    layers = [
        name.removesuffix(".weight")
        for name in transformer.tensors
        if name.endswith(".weight") and len(transformer.shape(name)) == 2
    ]
    unmatched = [target for target in targets if not any(_ends_with(layer, target) for layer in layers)]
    if unmatched:
        ends = dict.fromkeys(
            name.split(".", 2)[2] for name in layers if name.startswith("transformer_blocks.0.")
        )
        blocks = ", ".join(name.removeprefix("attn.") for name in ends)
        raise ValueError(
            f"lora_target_modules: no layer of the dit ends with {', '.join(map(repr, unmatched))}. The "
            f"layers of a block are {blocks}."
        )
    return [layer for layer in layers if any(_ends_with(layer, target) for target in targets)]


def _ends_with(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _sources(config: TrainConfig) -> tuple[list[Any], str]:
    """Files of each checkpoint, and the name of the model."""
    if config.model_paths:
        listed = _parse_paths(config.model_paths)
        first = listed[0] if isinstance(listed[0], str) else listed[0][0]
        return listed, str(Path(first).parent.parent)
    if config.model_id_with_origin_paths:
        entries = [_split_id(entry) for entry in comma_list(config.model_id_with_origin_paths)]
        groups = [group for entry in entries for group in _hub_files(*entry)]
        return groups, entries[0][0]
    logger.info("No model is named: the small model inside the package is trained.")
    folder = default_checkpoint()
    return [folder / component for component in COMPONENTS.values()], "the embedded model"


def _parse_paths(text: str) -> list[Any]:
    message = 'model_paths must be a JSON list of paths and lists of paths, such as ["a.safetensors"]'
    try:
        listed: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{message}: {error}.") from error
    valid = isinstance(listed, list) and all(
        isinstance(entry, str)
        or (isinstance(entry, list) and entry and all(isinstance(part, str) for part in entry))
        for entry in listed
    )
    if not valid or not listed:
        raise ValueError(f"{message}; got {text!r}.")
    return list(listed)


def _split_id(entry: str) -> tuple[str, str]:
    model_id, colon, pattern = entry.partition(":")
    if not colon or not pattern:
        raise ValueError(f"model_id_with_origin_paths: {entry!r} is not of the form ORG/NAME:PATTERN.")
    return model_id, pattern


def _hub_files(model_id: str, pattern: str) -> list[list[Path]]:
    files = find_files(model_id, pattern, hub="modelscope", folder=MODELS_FOLDER)
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise ValueError(f"{pattern!r} of {model_id} matches no .safetensors file.")
    folders = dict.fromkeys(file.parent for file in weights)
    return [[file for file in weights if file.parent == folder] for folder in folders]


def _check_complete(parts: Mapping[ComponentName, Checkpoint]) -> None:
    missing = [name for name, component in COMPONENTS.items() if component not in parts]
    if missing:
        raise ValueError(
            f"The files given hold no {' and no '.join(missing)}. Training needs the dit, the text encoder "
            "and the vae."
        )


def _tokenizer(config: TrainConfig, parts: Mapping[ComponentName, Checkpoint]) -> Path:
    if config.tokenizer_path:
        folder = Path(config.tokenizer_path)
    else:
        folder = parts["text_encoder"].files[0].parent.parent / "tokenizer"
        if not folder.is_dir():
            folder = find_files(PUBLISHED, "tokenizer/", hub="modelscope", folder=MODELS_FOLDER)[0].parent
    load_tokenizer(folder)  # checks it
    return folder
