"""Which component a checkpoint holds, told by its keys, and those keys in the module's own names.

Prefixes that other programs put before the keys are taken off (`MARKERS`): `model.diffusion_model.` and
`first_stage_model.` of ComfyUI, `transformer.` and `vae.` of diffusers, `pipe.dit.` of DiffSynth. The text
encoder's keys are brought from the layout of published files and transformers 4 (`visual.`, `model.`) to that
of the module in transformers 5 (`model.visual.`, `model.language_model.`).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from .config import infer_config, sidecar_config
from .reader import Checkpoint, open_checkpoint, quote

logger = logging.getLogger(__name__)

ComponentName = Literal["transformer", "vae", "text_encoder"]

MARKERS: Mapping[ComponentName, re.Pattern[str]] = {
    "transformer": re.compile(
        r"(?P<prefix>model\.diffusion_model\.|diffusion_model\.|transformer\.|pipe\.dit\.|)"
        r"transformer_blocks\.\d+\.img_mod\.1\.weight"
    ),
    "vae": re.compile(
        r"(?P<prefix>first_stage_model\.|vae\.|pipe\.vae\.|)decoder\.mid_block\.resnets\.0\.conv1\.weight"
    ),
    "text_encoder": re.compile(
        r"(?P<prefix>text_encoders\.qwen25_7b\.transformer\.|text_encoder\.|pipe\.text_encoder\.|)"
        r"(?:model\.)?visual\.blocks\.\d+\.mlp\.gate_proj\.weight"
    ),
}
# What other files look like, and what to do with them. The first match counts.
OTHERS: Sequence[tuple[re.Pattern[str], str]] = (
    (
        re.compile(r"lora_(?:A|B|down|up)\b|lokr_|hada_|lora_unet_"),
        "it is a LoRA: load it with `load_lora_weights`",
    ),
    (re.compile(r"controlnet_blocks\.|controlnet_x_embedder"), "it is a ControlNet, not a base model"),
    (
        re.compile(r"double_blocks\.|joint_blocks\.|single_transformer_blocks\."),
        "it is of another model family",
    ),
    (
        re.compile(r"(?:^|\.)decoder\.middle\.\d+\.residual\."),
        "it is a VAE in the layout of ComfyUI and Wan; take vae/diffusion_pytorch_model.safetensors",
    ),
    (
        re.compile(r"\.layers\.\d+\.self_attn\."),
        "it is a language model without the vision tower of Qwen2.5-VL",
    ),
)
# Parts of an all-in-one file; they are passed over when another component was asked for.
FOREIGN_PREFIXES = ("first_stage_model.", "vae.", "text_encoders.", "text_encoder.", "cond_stage_model.")
SCALED_FP8_MARKER = "scaled_fp8"  # see scaled.py
EXPECTED = (
    "a Qwen-Image transformer (`transformer_blocks.0.img_mod.1.weight`, ...), its VAE "
    "(`decoder.mid_block.resnets.0.conv1.weight`, ...) or its Qwen2.5-VL text encoder "
    "(`visual.blocks.0.mlp.gate_proj.weight`, ...)"
)


def read_component(
    source: Checkpoint | str | Path | Sequence[str | Path],
    component: ComponentName,
    *,
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Checkpoint]:
    """Config and tensors (unread, in module names) of one component of a file, shards or folder, or of
    an opened checkpoint.

    `config` wins over a `config.json` beside the file, which wins over what the shapes say.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the files hold something else, or the config cannot be told.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    found = find_components(checkpoint)
    if component not in found:
        raise ValueError(
            f"{_files(checkpoint)} holds the {' and '.join(found)}, but the {component} is needed here."
        )
    part = found[component]
    if config is None:
        config = sidecar_config(component, part.files[0]) or infer_config(component, part)
    return dict(config), part


def find_components(checkpoint: Checkpoint) -> dict[ComponentName, Checkpoint]:
    """Split a checkpoint into the components it holds (usually one), with the keys of their modules.

    Raises:
        ValueError: if nothing is recognised (it says what was expected and the first keys), or keys are left
            over that belong to no known component.
    """
    reason = _what_else(checkpoint, OTHERS[:3])
    prefixes = {} if reason else _prefixes(checkpoint)
    if not prefixes:
        reason = reason or _what_else(checkpoint, OTHERS)
        raise ValueError(
            f"{_files(checkpoint)} is not recognised{': ' + reason if reason else ''}. Expected {EXPECTED}. "
            f"Its first keys: {quote(checkpoint.tensors)}."
        )
    names: dict[ComponentName, dict[str, str]] = {name: {} for name in prefixes}
    left: list[str] = []
    for key in checkpoint.tensors:
        owner = next((name for name, prefix in prefixes.items() if _belongs(key, prefix)), None)
        if key == SCALED_FP8_MARKER:  # a remark on the whole file
            for renames in names.values():
                renames[key] = key
        elif owner is None:
            left.append(key)
        else:
            names[owner][key] = key.removeprefix(prefixes[owner])
    _check_left(checkpoint, left)
    if "text_encoder" in names:
        names["text_encoder"] = {key: _text_encoder_name(n) for key, n in names["text_encoder"].items()}
    return {name: checkpoint.renamed(renames) for name, renames in names.items()}


def _what_else(checkpoint: Checkpoint, others: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    return next((text for pattern, text in others if any(map(pattern.search, checkpoint.tensors))), None)


def _prefixes(checkpoint: Checkpoint) -> dict[ComponentName, str]:
    """Component -> prefix of its keys, the longest prefix first."""
    found: dict[ComponentName, str] = {}
    for name in get_args(ComponentName):
        prefixes = {m["prefix"] for key in checkpoint.tensors if (m := MARKERS[name].fullmatch(key))}
        if len(prefixes) > 1:
            raise ValueError(f"{_files(checkpoint)} holds the {name} twice, under {quote(sorted(prefixes))}.")
        if prefixes:
            found[name] = prefixes.pop()
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _belongs(key: str, prefix: str) -> bool:
    return key.startswith(prefix) if prefix else not key.startswith(FOREIGN_PREFIXES)


def _text_encoder_name(name: str) -> str:
    """Published files and transformers 4 -> the module of transformers 5."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def _check_left(checkpoint: Checkpoint, left: Sequence[str]) -> None:
    unknown = [key for key in left if not key.startswith(FOREIGN_PREFIXES)]
    if unknown:
        raise ValueError(
            f"{_files(checkpoint)} holds {len(unknown)} keys of no known component: {quote(unknown)}."
        )
    if left:
        logger.warning(
            "%s: passed over %d tensors of another component in an unknown layout (%s).",
            _files(checkpoint),
            len(left),
            quote(left, limit=2),
        )


def _files(checkpoint: Checkpoint) -> str:
    return quote((str(file) for file in checkpoint.files), limit=2)
