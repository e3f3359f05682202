"""The rules of diffusers' `QwenImageLoraLoaderMixin`, by version.

The loader decides once for the whole file: if any key looks foreign (`.alpha`, `lora_unet_`,
`diffusion_model.`, `default.`), every key goes through a converter that puts `transformer.` in front; else
only keys that start with `transformer.` are looked at. So one alpha key beside `transformer.` keys makes
`transformer.transformer.` of them, and bare keys without any of the four marks are dropped with a warning.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffusers_qwenimage.lora.predict import Fate, Load, Outcome, Trait, Verdict
from diffusers_qwenimage.lora.scales import METADATA_KEY

NO_KEYS: tuple[Verdict, str] = (
    "nothing",
    "no key starts with transformer.; diffusers warns and loads nothing",
)
WITHOUT_TENSORS = "an adapter is made, but its tensors are skipped without an error"
PEFT_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


@dataclass(frozen=True, kw_only=True)
class DiffusersRules:
    """What changed between versions.

    Attributes:
        marks_prefix_and_default: whether `diffusion_model.` and `default.` start the converter (0.36).
        top_level: whether flattened modules outside the blocks are found (0.39).
        optional_alpha: whether files of lora_down without alpha, and the alpha of lora_A, are read (0.42).
        mixed_ranks: whether each module of a file without configuration gets the scale 1 (0.40); before, the
            rank of the first module is the alpha of all.
    """

    marks_prefix_and_default: bool
    top_level: bool
    optional_alpha: bool
    mixed_ranks: bool


V0_35 = DiffusersRules(
    marks_prefix_and_default=False, top_level=False, optional_alpha=False, mixed_ranks=False
)
V0_36 = DiffusersRules(
    marks_prefix_and_default=True, top_level=False, optional_alpha=False, mixed_ranks=False
)
V0_40 = DiffusersRules(marks_prefix_and_default=True, top_level=True, optional_alpha=False, mixed_ranks=True)
V0_42 = DiffusersRules(marks_prefix_and_default=True, top_level=True, optional_alpha=True, mixed_ranks=True)


def diffusers_loader(rules: DiffusersRules) -> Load:
    """The loader of a version of diffusers."""

    def load(traits: Sequence[Trait], metadata: Mapping[str, str]) -> Outcome:
        converted = converts(traits, rules)
        outcome = convert(traits, rules) if converted else _direct(traits)
        if METADATA_KEY in metadata:
            return _with_metadata(outcome, traits, metadata, converted=converted)
        if not converted and traits and all(item.update.kind == "embedding" for item in traits):
            return Outcome(stopped=("error", "no rank is found without lora_adapter_metadata (IndexError)"))
        return outcome if rules.mixed_ranks else _with_one_alpha(outcome, traits)

    return load


def vllm_loader(rules: DiffusersRules) -> Load:
    """vLLM-Omni: the converter for some files, then only `transformer.<module>.lora_A.weight`."""

    def load(traits: Sequence[Trait], metadata: Mapping[str, str]) -> Outcome:
        quiet: tuple[Verdict, str] = ("nothing", "no key is recognised; vLLM-Omni warns and loads nothing")
        if any(item.has_alpha or item.prefix == "diffusion_model." for item in traits):
            outcome = convert(traits, rules)
            if outcome.stopped and "no module" in outcome.stopped[1]:
                return Outcome(fates=["lost"] * len(traits), when_nothing=quiet)
            return outcome
        fates: list[Fate] = [_exact_peft(item) for item in traits]
        return Outcome(fates=fates, when_nothing=quiet)

    return load


def converts(traits: Sequence[Trait], rules: DiffusersRules) -> bool:
    """Whether the converter runs."""
    if any(item.has_alpha or item.prefix == "lora_unet_" for item in traits):
        return True
    marked = any(item.prefix == "diffusion_model." or item.adapter == "default" for item in traits)
    return rules.marks_prefix_and_default and marked


def convert(traits: Sequence[Trait], rules: DiffusersRules) -> Outcome:
    """What the converter makes of the updates."""
    down = any(item.spelling == "lora_down" for item in traits)
    wanted = ("lora_down",) if down else ("lora_A", "lora_A.{adapter}")
    for item in traits:
        problem = _left_over(item, wanted, rules, lora_a=not down)
        if problem:
            return Outcome(stopped=("error", problem))
    if not rules.top_level and any(item.top_level and item.flat for item in traits):
        return Outcome(stopped=("error", "flattened modules outside the blocks are mistaken for blocks"))
    fates: list[Fate] = [_converted(item, rules, lora_a=not down) for item in traits]
    if all(fate == "lost" for fate in fates):
        return Outcome(stopped=("error", "after the conversion no module of the model is named"))
    return Outcome(fates=fates)


def _left_over(item: Trait, wanted: Sequence[str], rules: DiffusersRules, *, lora_a: bool) -> str:
    """Why the converter stops at an update, or ""."""
    if item.update.kind not in ("lora", "dora"):
        return f"the converter does not know {item.update.kind} keys"
    if item.spelling not in wanted or (item.adapter is not None and item.adapter != "default"):
        return "the file mixes spellings, and the converter reads one"
    if item.magnitude and item.magnitude != "dora_scale":  # dora_scale is taken out before, with a warning
        return f"the converter does not know {item.magnitude}"
    if lora_a and not rules.marks_prefix_and_default:
        return "the converter of this version knows lora_down only"
    if not lora_a and not item.has_alpha and not rules.optional_alpha:
        return "the converter of this version needs alpha keys"
    return ""


def _converted(item: Trait, rules: DiffusersRules, *, lora_a: bool) -> Fate:
    if item.prefix not in ("", "diffusion_model.", "lora_unet_") or item.fused:
        return "lost"
    if item.magnitude:
        return "no magnitude"
    dropped = lora_a and not rules.optional_alpha and item.has_alpha
    return "unscaled" if dropped and not item.update.scale.is_one else "applied"


def _direct(traits: Sequence[Trait]) -> Outcome:
    """A file that goes to PEFT as it is."""
    ours = [item for item in traits if item.prefix == "transformer."]
    if any(item.update.kind not in ("lora", "dora", "embedding") for item in traits):
        return Outcome(stopped=("error", 'a key lacks "lora": Invalid LoRA checkpoint'))
    if any(item.magnitude == "magnitude" for item in traits):
        return Outcome(stopped=("error", 'a key lacks "lora": Invalid LoRA checkpoint'))
    if not ours:
        return Outcome(fates=["lost"] * len(traits), when_nothing=NO_KEYS)
    first = min(ours, key=lambda item: min(tensor.key for tensor in item.update.tensors.values()))
    if first.spelling == "lora_down":
        return Outcome(stopped=("error", "lora_down without the converter has no rank (IndexError)"))
    old = first.spelling == "lora.down"
    fates: list[Fate] = [
        "lost"
        if item.prefix != "transformer." or (item.spelling == "lora.down") != old
        else _exact_peft(item)
        for item in traits
    ]
    if old:
        fates = ["applied" if item.spelling == "lora.down" else "lost" for item in traits]
    return Outcome(
        fates=fates,
        when_nothing=("partly", WITHOUT_TENSORS),
        when_partly="the others are lost without an error",
    )


def _exact_peft(item: Trait) -> Fate:
    if item.prefix != "transformer." or item.spelling != "lora_A" or item.fused:
        return "lost"
    if item.magnitude and item.magnitude not in PEFT_MAGNITUDES:
        return "no magnitude"
    return "applied"


def _with_one_alpha(outcome: Outcome, traits: Sequence[Trait]) -> Outcome:
    """The rank of the first module as the alpha of all: other ranks get another strength."""
    if outcome.stopped or any(item.update.rank is None for item in traits):
        return outcome
    loaded = [item for item, fate in zip(traits, outcome.fates, strict=True) if fate != "lost"]
    if not loaded:
        return outcome
    first = min(loaded, key=lambda item: min(tensor.key for tensor in item.update.tensors.values()))
    factors = [(first.update.rank or 1) / (item.update.rank or 1) for item in traits]
    return replace(outcome, factors=factors)


def _with_metadata(
    outcome: Outcome, traits: Sequence[Trait], metadata: Mapping[str, str], *, converted: bool
) -> Outcome:
    """The effect of `lora_adapter_metadata`, which decides the scale of whatever was loaded."""
    if outcome.stopped or all(fate == "lost" for fate in outcome.fates):
        return outcome
    fields = _fields(metadata[METADATA_KEY])
    if not any(key.startswith("transformer.") for key in fields):
        problem = f"the fields of {METADATA_KEY} have no prefix transformer. (KeyError 'model_type')"
        return Outcome(stopped=("error", problem))
    alpha, rank = fields.get("transformer.lora_alpha"), fields.get("transformer.r")
    if not converted or not isinstance(alpha, int | float) or not isinstance(rank, int | float):
        return outcome  # without alpha keys, the scale that was read is that of the metadata
    # On top of the alpha keys.
    factors = [alpha / rank if item.update.scale.source == "key" else 1.0 for item in traits]
    return replace(outcome, factors=factors)


def _fields(text: str) -> dict[str, object]:
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
