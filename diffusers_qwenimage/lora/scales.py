"""Where the scale of an update is found: its alpha key, adapter_config.json, lora_adapter_metadata, or
nowhere.

An alpha key always counts. Without one, the configuration of PEFT counts, from adapter_config.json or, as
diffusers and SimpleTuner save it, from the metadata. Without both the scale is 1: that is what every loader
assumes, also when other metadata (`ss_network_alpha`) names an alpha.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from diffusers_qwenimage.lora.updates import Scale, ScaleSource, StoredTensor, unit_scale

METADATA_KEY = "lora_adapter_metadata"
Number = TypeVar("Number", int, float)
_MODULE_NAME = re.compile(r"[\w.]+")
PLACEHOLDER_ALPHA = 1e9  # ai-toolkit writes 1e10 (infinity in fp16) beside full LoKr factors, and ignores it


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields of a PEFT configuration that decide the scale."""

    alpha: float
    rank: int
    alpha_pattern: Mapping[str, float]
    rank_pattern: Mapping[str, int]
    rslora: bool
    lokr: bool

    def scale(self, module: str, rank: int, source: ScaleSource) -> Scale:
        """The scale of a module; raises ValueError if the tensors have another rank than stated."""
        stated = _lookup(self.rank_pattern, module, self.rank)
        if stated != rank:
            raise ValueError(f"{module} has rank {rank}, but its {source} says {stated}")
        alpha = _lookup(self.alpha_pattern, module, self.alpha)
        return Scale(alpha=float(alpha), rank=rank, source=source, rslora=self.rslora)


@dataclass(frozen=True, kw_only=True)
class ScaleRules:
    """What the metadata and the configuration of a file say about scales."""

    config: AdapterConfig | None
    source: ScaleSource
    notes: tuple[str, ...]

    def without_key(self, module: str, rank: int, problems: list[str]) -> Scale:
        """The scale of an update without an alpha key."""
        if self.config is None:
            return unit_scale(rank)
        try:
            return self.config.scale(module, rank, self.source)
        except ValueError as error:
            problems.append(str(error))
            return unit_scale(rank)

    def whole_lokr(self, module: str) -> Scale:
        """The scale of a LoKr of two whole factors: that of PEFT's configuration, else 1.

        PEFT multiplies by alpha / r there, too. Everybody else ignores the alpha key: it is a placeholder
        (ai-toolkit) or equals the rank (LyCORIS).
        """
        if self.config is None or not self.config.lokr:
            return unit_scale()
        rank = _lookup(self.config.rank_pattern, module, self.config.rank)
        alpha = _lookup(self.config.alpha_pattern, module, self.config.alpha)
        return Scale(alpha=alpha, rank=rank, source=self.source)


def scale_rules(
    metadata: Mapping[str, str], adapter_config: Mapping[str, object] | None, problems: list[str]
) -> ScaleRules:
    """Read the configuration of a file; what is wrong with it is added to `problems`."""
    raw: Mapping[str, object] | None = adapter_config
    source: ScaleSource = "adapter_config"
    notes: list[str] = []
    if raw is None and METADATA_KEY in metadata:
        source = "metadata"
        raw = _parse_metadata(metadata[METADATA_KEY], problems, notes)
    if raw is None and "ss_network_alpha" in metadata:
        notes.append(
            f"the metadata names ss_network_alpha {metadata['ss_network_alpha'][:20]}, which loaders do not "
            "read; only alpha keys count"
        )
    config = None
    if raw is not None:
        try:
            config = _config(raw)
        except ValueError as error:
            problems.append(f"bad {source}: {error}")
    return ScaleRules(config=config, source=source, notes=tuple(notes))


def scale_from_key(alpha: StoredTensor, rank: int, problems: list[str], *, read_values: bool) -> Scale:
    """The scale that an alpha key gives; 0, NaN and infinity are problems."""
    if math.prod(alpha.shape) != 1:
        problems.append(f"{alpha.key} must be one number, got shape {list(alpha.shape)}")
        return unit_scale(rank)
    if not read_values:
        return Scale(alpha=None, rank=rank, source="key")
    value = float(alpha.load().to(torch.float64).reshape(()))
    if not math.isfinite(value) or value == 0:
        problems.append(f"{alpha.key} is {value}, which switches the module off or breaks it")
        return unit_scale(rank)
    return Scale(alpha=value, rank=rank, source="key")


def _parse_metadata(text: str, problems: list[str], notes: list[str]) -> Mapping[str, object] | None:
    """The configuration in the metadata, without the prefix that diffusers puts in front of each field."""
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        problems.append(f"{METADATA_KEY} is not valid JSON ({error})")
        return None
    if not isinstance(raw, dict):
        problems.append(f"{METADATA_KEY} must hold a JSON object")
        return None
    prefixed = {
        key.removeprefix("transformer."): value
        for key, value in raw.items()
        if key.startswith("transformer.")
    }
    if not prefixed and raw:
        notes.append(
            f"the fields of {METADATA_KEY} have no prefix transformer., so diffusers refuses the file"
        )
    return prefixed or raw


def _config(raw: Mapping[str, object]) -> AdapterConfig | None:
    """Pick the fields; None when the configuration names neither rank nor alpha."""
    lokr_or_loha = raw.get("peft_type") in ("LOKR", "LOHA")
    alpha = raw.get("alpha" if lokr_or_loha else "lora_alpha")
    rank = raw.get("r")
    if alpha is None and rank is None:
        return None
    alpha, rank = _number(alpha, "alpha"), _number(rank, "rank")
    if alpha == 0 or rank < 1 or rank != int(rank):
        raise ValueError(f"rank {rank} and alpha {alpha} give no scale")
    return AdapterConfig(
        alpha=alpha,
        rank=int(rank),
        alpha_pattern=_pattern(raw, "alpha_pattern"),
        rank_pattern={key: int(value) for key, value in _pattern(raw, "rank_pattern").items()},
        rslora=raw.get("use_rslora") is True,
        lokr=raw.get("peft_type") == "LOKR",
    )


def _pattern(raw: Mapping[str, object], field: str) -> dict[str, float]:
    """A field that maps module names to numbers. Regular expressions are refused: they may take for ever."""
    pattern = raw.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{field} must map module names to numbers, got {type(pattern).__name__}")
    result = {}
    for key, value in pattern.items():
        name = key.removeprefix("^").replace("\\.", ".")
        if not _MODULE_NAME.fullmatch(name):
            raise ValueError(f"{field} holds the regular expression {key[:80]!r}; write module names")
        result[name] = _number(value, f"{field}[{name}]")
    return result


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _lookup(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """PEFT's rule: the first name that is the whole path or its end, after a dot."""
    if module in pattern:
        return pattern[module]
    return next((value for name, value in pattern.items() if module.endswith(f".{name}")), default)
