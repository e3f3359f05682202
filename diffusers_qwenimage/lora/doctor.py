"""Known damage of LoRA files: found, named, and repaired into a new file where nothing has to be guessed.

Repaired: prefixes that should not be there, names of PEFT adapters in keys, spellings that are mixed, tensors
that are there twice with the same bits, alphas without a module, `lora_adapter_metadata` that loaders refuse
or that contradicts the alpha keys, hashes that do not fit the data. Not repaired: whatever leaves two
possible meanings, or lacks numbers (half a pair, NaN, a stated scale that fits no tensor).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers_qwenimage.files import SafetensorsHeader, read_header
from diffusers_qwenimage.lora.compose import write_composed
from diffusers_qwenimage.lora.convert import Conversion
from diffusers_qwenimage.lora.formats import FORMATS, parse_key
from diffusers_qwenimage.lora.metadata import HASH_KEYS
from diffusers_qwenimage.lora.provenance import tensor_bits
from diffusers_qwenimage.lora.read import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    LoraFile,
    listing,
    open_tensors,
    parse_tensors,
    read_adapter_config,
)
from diffusers_qwenimage.lora.render import Options
from diffusers_qwenimage.lora.scales import METADATA_KEY, scale_rules
from diffusers_qwenimage.lora.targets import find_target, refusal
from diffusers_qwenimage.lora.updates import StoredTensor
from diffusers_qwenimage.lora.write import Progress

# Targets that a repaired file may take if none is asked for: the first that holds all of it.
TARGETS_TO_TRY = ("opensource", "comfyui", "kohya", "diffusers", "peft")
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of damage; `repaired` says whether the repaired file is free of it."""

    text: str
    repaired: bool


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a file, and its content without that (None if something cannot be repaired)."""

    findings: tuple[Finding, ...]
    file: LoraFile | None

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def hopeless(self) -> tuple[str, ...]:
        """What cannot be repaired."""
        return tuple(finding.text for finding in self.findings if not finding.repaired)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """The diagnosis, and what was written; `conversion` is None for a healthy file, which is not copied."""

    diagnosis: Diagnosis
    target: str
    conversion: Conversion | None


def diagnose(path: str | Path, *, drop_unknown: bool = False) -> Diagnosis:
    """Look for damage; nothing is written.

    Args:
        path: a LoRA file or a PEFT folder.
        drop_unknown: leave out keys that no format knows, instead of giving up.

    Raises:
        ValueError: if the file is not a safetensors file.
    """
    weights = Path(path) / ADAPTER_MODEL if Path(path).is_dir() else Path(path)
    header = read_header(weights)
    config_path = weights.parent / ADAPTER_CONFIG
    is_peft = weights.name == ADAPTER_MODEL and config_path.is_file()
    config = read_adapter_config(config_path) if is_peft else None
    findings: list[Finding] = []
    tensors = _without_doubles(open_tensors(weights, header), findings)
    tensors = _without_unknown(tensors, findings, drop=drop_unknown)
    metadata = _good_metadata(tensors, header.metadata, findings) if config is None else header.metadata
    metadata = _true_hashes(weights, header, metadata, findings)
    tensors = _without_stray_alphas(tensors, findings)
    file = parse_tensors(tensors, name=str(path), metadata=metadata, adapter_config=config)
    _spelling_findings(file, findings)
    findings += [Finding(text=problem, repaired=False) for problem in file.problems]
    hopeless = any(not finding.repaired for finding in findings)
    return Diagnosis(findings=tuple(findings), file=None if hopeless else replace(file, notes=()))


def repair_lora(
    source: str | Path,
    output: str | Path,
    to: str | None = None,
    *,
    drop_unknown: bool = False,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Write a file without the damage that was found, proved to hold the same changes.

    Args:
        to: name of a target; None takes the first that holds the file, "opensource" if possible.

    Raises:
        ValueError: if something cannot be repaired; nothing is written then.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} is the input; name another file.")
    diagnosis = diagnose(source, drop_unknown=drop_unknown)
    if diagnosis.hopeless:
        raise ValueError(f"{source} cannot be repaired: {listing(diagnosis.hopeless)}.")
    assert diagnosis.file is not None
    target = to or _fitting_target(diagnosis.file)
    if diagnosis.healthy:
        return Repair(diagnosis=diagnosis, target=target, conversion=None)
    conversion = write_composed(
        diagnosis.file, output, target, metadata={}, options=options, progress=progress
    )
    return Repair(diagnosis=diagnosis, target=target, conversion=conversion)


def _fitting_target(file: LoraFile) -> str:
    for name in TARGETS_TO_TRY:
        target = find_target(name)
        if all(not refusal(target, update) for update in file.updates):
            return name
    return TARGETS_TO_TRY[0]  # rendering will say why it cannot hold it


def _without_doubles(tensors: Mapping[str, StoredTensor], findings: list[Finding]) -> dict[str, StoredTensor]:
    """Drop tensors that are there twice under different keys, if their bits are the same."""
    kept: dict[str, StoredTensor] = {}
    seen: dict[tuple[str, str, str], StoredTensor] = {}
    dropped = []
    for key, tensor in tensors.items():
        found = parse_key(key)
        place = (found[1].component, found[1].module, found[1].role) if found else None
        other = seen.get(place) if place else None
        if other is not None and _same(other, tensor):
            dropped.append(key)
            continue
        kept[key] = tensor
        if place:
            seen.setdefault(place, tensor)
    if dropped:
        text = f"{len(dropped)} tensors were there twice with the same bits, such as {dropped[0]}"
        findings.append(Finding(text=text, repaired=True))
    return kept


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return tensor_bits(first) == tensor_bits(second)


def _without_unknown(
    tensors: Mapping[str, StoredTensor], findings: list[Finding], *, drop: bool
) -> dict[str, StoredTensor]:
    unknown = [key for key in tensors if parse_key(key) is None]
    if not unknown or not drop:  # those that are kept become problems of the file
        return dict(tensors)
    findings.append(
        Finding(text=f"{len(unknown)} unknown keys are left out, as asked: {listing(unknown)}", repaired=True)
    )
    return {key: tensor for key, tensor in tensors.items() if key not in set(unknown)}


def _without_stray_alphas(
    tensors: Mapping[str, StoredTensor], findings: list[Finding]
) -> dict[str, StoredTensor]:
    """Drop alphas of modules that have nothing else: they change nothing."""
    roles: dict[tuple[str, str], set[str]] = {}
    places = {}
    for key in tensors:
        found = parse_key(key)
        if found:
            places[key] = (found[1].component, found[1].module)
            roles.setdefault(places[key], set()).add(found[1].role)
    stray = [key for key in tensors if key in places and roles[places[key]] == {"alpha"}]
    if stray:
        text = f"{len(stray)} alpha keys belong to no factors, such as {stray[0]}"
        findings.append(Finding(text=text, repaired=True))
    return {key: tensor for key, tensor in tensors.items() if key not in set(stray)}


def _good_metadata(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], findings: list[Finding]
) -> dict[str, str]:
    """The metadata without a `lora_adapter_metadata` that loaders refuse or that contradicts the tensors."""
    if METADATA_KEY not in metadata:
        return dict(metadata)
    without = {key: value for key, value in metadata.items() if key != METADATA_KEY}
    problems: list[str] = []
    rules = scale_rules(metadata, None, problems)
    if problems:
        text = f"{problems[0]}; without it the scale is 1 where there is no alpha key"
        findings.append(Finding(text=text, repaired=True))
        return without
    file = parse_tensors(tensors, name="", metadata=metadata)
    plain = parse_tensors(tensors, name="", metadata=without)
    contradictions = [problem for problem in file.problems if problem not in plain.problems]
    if contradictions:
        config = rules.config
        assert config is not None
        says_one = config.alpha == config.rank and not config.rslora and not config.alpha_pattern
        text = f"{METADATA_KEY} does not fit the tensors: {contradictions[0]}"
        if not says_one:
            text += f"; the scale it means ({config.alpha:g} for rank {config.rank}) is not certain any more"
        findings.append(Finding(text=text, repaired=says_one))
        return without if says_one else dict(metadata)
    if any("no prefix" in note for note in rules.notes):
        findings.append(Finding(text=rules.notes[0], repaired=True))
    by_key = any(update.scale.source == "key" for update in file.updates)
    if by_key and rules.config is not None and rules.config.alpha != rules.config.rank:
        text = f"{METADATA_KEY} states a scale besides the alpha keys, so diffusers would apply both"
        findings.append(Finding(text=text, repaired=True))
    return dict(metadata)


def _true_hashes(
    path: Path, header: SafetensorsHeader, metadata: Mapping[str, str], findings: list[Finding]
) -> dict[str, str]:
    """The metadata without hashes that are not those of the data."""
    stated = {key: metadata[key] for key in ("sshs_model_hash", "modelspec.hash_sha256") if key in metadata}
    if not stated:
        return dict(metadata)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header.data_start)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    wrong = [key for key, value in stated.items() if value.removeprefix("0x") != digest.hexdigest()]
    if not wrong:
        return dict(metadata)
    findings.append(Finding(text=f"{' and '.join(wrong)} is not the hash of the data", repaired=True))
    return {key: value for key, value in metadata.items() if key not in HASH_KEYS}


def _spelling_findings(file: LoraFile, findings: list[Finding]) -> None:
    damage = {format_.name: format_.damage for format_ in FORMATS if format_.damage}
    for name, count in file.formats.items():
        if name in damage:
            findings.append(Finding(text=f"{count} keys: {damage[name]}", repaired=True))
    ours = _transformer_formats(file)
    if len(ours) > 1:
        text = f"the file mixes spellings ({', '.join(ours)}), of which many loaders read one only"
        findings.append(Finding(text=text, repaired=True))


def _transformer_formats(file: LoraFile) -> Sequence[str]:
    components = {format_.name: format_.component for format_ in FORMATS}
    return [name for name in file.formats if components[name] == "transformer"]
