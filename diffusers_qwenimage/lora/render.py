"""A LoRA file -> the tensors, names and metadata of a target, planned without keeping data.

    file = read_lora(path)                          # updates with lazily read tensors
    rendered = render(file, find_target("kohya"))   # refuses what the target cannot hold

A conversion renames. Where the target has no place for a scale, the scale is multiplied into a factor if that
is exact; LoKr and LoHa become plain factors if that is exact; everything else is refused with the reason.
With `allow_approximate`, the nearest form is written instead; `verify.py` measures its error.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import torch

from diffusers_qwenimage.lora.approximate import low_rank
from diffusers_qwenimage.lora.architectures import block_index
from diffusers_qwenimage.lora.factors import derived, expand, expanded_rank, fold_scale
from diffusers_qwenimage.lora.fused import fuse, split_all
from diffusers_qwenimage.lora.metadata import converted_metadata, peft_config
from diffusers_qwenimage.lora.read import NUM_LISTED, LoraFile
from diffusers_qwenimage.lora.scales import METADATA_KEY
from diffusers_qwenimage.lora.targets import Target, refusal
from diffusers_qwenimage.lora.updates import LoraUpdate, StoredTensor, stored, unit_scale

Action = Literal["renamed", "folded", "expanded", "approximated", "split", "fused"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How far a conversion may go.

    Attributes:
        strict: only bit-identical tensors under new names.
        allow_approximate: round a scale or cut a rank where there is no exact way.
        max_rank: the rank of an approximation.
        drop_text_encoder: leave out updates of the text encoder where the target has no keys for them.
    """

    strict: bool = False
    allow_approximate: bool = False
    max_rank: int = 128
    drop_text_encoder: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """What was done with one update."""

    module: str
    action: Action
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A file in its target's spelling, ready to be written.

    Attributes:
        target: what it is written as.
        tensors: named and in no particular order.
        metadata: of the safetensors file.
        adapter_config: of a PEFT folder.
        steps: one per update.
        source_updates: the updates that were rendered (without those that were dropped on request).
        folded: by key of the source: the factor that was multiplied into that tensor.
        notes: what the user has to know.
    """

    target: Target
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    adapter_config: Mapping[str, object] | None
    steps: tuple[Step, ...]
    source_updates: tuple[LoraUpdate, ...]
    folded: Mapping[str, float]
    notes: tuple[str, ...]

    def count(self, action: Action) -> int:
        """Number of updates that were treated so."""
        return sum(step.action == action for step in self.steps)


@dataclass(kw_only=True)
class _Work:
    """What a rendering collects."""

    target: Target
    options: Options
    updates: list[LoraUpdate] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    folded: dict[str, float] = field(default_factory=dict)


def render(file: LoraFile, target: Target, options: Options | None = None) -> Rendered:
    """Spell a file for a target.

    Raises:
        ValueError: if an update has no exact form there (and approximation was not asked for, or is
            impossible); the first few are listed with their reasons.
    """
    work = _Work(target=target, options=options or Options())
    sources, notes = _sources(file, work)
    for update in sources:
        if update.component == "transformer" and file.architecture.parts(update.module) and not target.fused:
            work.refusals.append(
                f"a {update.kind} of joined q, k and v cannot be taken apart ({update.module})"
            )
        else:
            _place(update, work)
    parts = {update.module for update in sources} - {update.module for update in file.updates}
    work.steps[:] = [
        replace(step, action="split") if step.module in parts and step.action == "renamed" else step
        for step in work.steps
    ]
    if target.fused and not work.refusals:
        _fuse(file, work)
    _check_strict(work)
    if work.refusals:
        raise ValueError(f"{file.name} cannot become {target.name}: {_reasons(work.refusals)}.")
    if not work.updates:
        raise ValueError(f"{file.name} holds no update for {target.name}.")
    tensors, alpha_as_before = _tensors(work)
    same = alpha_as_before and all(step.action == "renamed" for step in work.steps)
    metadata = converted_metadata(file.metadata, same_structure=same)
    config = _config(work)
    if config is not None and not target.directory:
        metadata[METADATA_KEY] = _prefixed_json(config)
    warnings: tuple[str, ...] = (target.warning,) if target.warning and _warns(target, work) else ()
    if target.dora_warning and any(update.magnitude_axis for update in work.updates):
        warnings += (target.dora_warning,)
    return Rendered(
        target=target,
        tensors=tuple(tensors),
        metadata=metadata,
        adapter_config={"peft_type": "LORA", **config} if config is not None and target.directory else None,
        steps=tuple(work.steps),
        source_updates=tuple(sources),
        folded=work.folded,
        notes=(*file.notes, *notes, *warnings),
    )


def _sources(file: LoraFile, work: _Work) -> tuple[list[LoraUpdate], list[str]]:
    """The updates to write: fused modules in parts, and without the text encoder if it is to be dropped."""
    updates, notes = list(file.updates), []
    if work.options.drop_text_encoder and work.target.text_encoder is None:
        kept = [update for update in updates if update.component == "transformer"]
        if len(kept) < len(updates):
            notes.append(f"{len(updates) - len(kept)} updates of the text encoder were dropped, as asked")
        updates = kept
    return updates if work.target.fused else split_all(updates, file.architecture), notes


def _place(update: LoraUpdate, work: _Work) -> None:
    """Bring one update into a form that the target holds, or note why there is none."""
    target, approximate = work.target, work.options.allow_approximate
    reason = refusal(target, update)
    if update.kind == "diff" and approximate and update.shape is not None and len(update.shape) == 2:
        reason = ""
    if reason:
        work.refusals.append(f"{reason} ({update.module})")
        return
    action: Action = "renamed"
    if update.kind not in target.kinds:
        placed = _as_factors(update, work)
        if placed is None:
            return
        update, action = placed
    whole = update.kind == "lokr" and update.rank is None  # loaders read no scale beside whole factors
    plain = update.kind in ("lora", "dora")
    if (whole or (plain and not target.holds_alpha)) and not update.scale.is_one:
        roles = ("up", "down") if plain else ("lokr_w2", "lokr_w1")
        folded = fold_scale(update, allow_rounding=approximate, roles=roles)
        if folded is None:
            work.refusals.append(
                f"{target.name} has no place for a scale, and {update.scale.value:.6g} cannot be multiplied "
                f"into a factor exactly; --allow-approximate rounds it ({update.module})"
            )
            return
        if action == "renamed":
            action = "folded" if folded.exact else "approximated"
        work.folded[update.tensors[folded.role].key] = update.scale.value
        update = replace(update, tensors=folded.tensors, scale=unit_scale(update.rank or 1))
    work.updates.append(update)
    work.steps.append(Step(module=update.module, action=action))


def _as_factors(update: LoraUpdate, work: _Work) -> tuple[LoraUpdate, Action] | None:
    """An update as plain factors, expanded or approximated; None (and a refusal) if that cannot be."""
    assert update.shape is not None
    approximate = work.options.allow_approximate
    if update.kind in ("lokr", "loha"):
        rank, full = expanded_rank(update), min(update.shape)
        if rank < full:
            expanded = expand(update)
            if expanded.exact or approximate:
                plain = replace(update, kind="lora", tensors=expanded.tensors)
                return plain, "expanded" if expanded.exact else "approximated"
            work.refusals.append(
                f"the products of its {update.kind} factors do not fit their type exactly; "
                f"--allow-approximate rounds them ({update.module})"
            )
            return None
        if not approximate:
            work.refusals.append(
                f"{update.kind} as plain factors would have the full rank {full}; --allow-approximate cuts "
                f"it to {min(work.options.max_rank, full)} ({update.module})"
            )
            return None
    up, down = low_rank(update, min(work.options.max_rank, *update.shape))
    key = next(iter(update.tensors.values())).key
    tensors = {"up": stored(key, up), "down": stored(key, down)}
    plain = replace(update, kind="lora", tensors=tensors, scale=unit_scale(down.shape[0]))
    return plain, "approximated"


def _fuse(file: LoraFile, work: _Work) -> None:
    """Join the q, k and v updates of each block."""
    architecture = file.architecture
    by_module = {update.module: update for update in work.updates}
    actions = {step.module: step.action for step in work.steps}
    for block in sorted({index for u in work.updates if (index := block_index(u.module)) is not None}):
        for name, relative in architecture.fused.items():
            parts = [f"{architecture.blocks}.{block}.{part}" for part in relative]
            module = f"{architecture.blocks}.{block}.{name}"
            if not any(part in by_module for part in parts):
                continue
            if module in by_module:
                work.refusals.append(f"{module} is there beside its parts")
                continue
            by_module[module] = fuse(module, parts, by_module)
            for part in parts:
                if by_module.pop(part, None) and actions[part] == "renamed":
                    actions[part] = "fused"
    work.updates[:] = by_module.values()
    work.steps[:] = [Step(module=module, action=action) for module, action in actions.items()]


def _tensors(work: _Work) -> tuple[list[StoredTensor], bool]:
    """Every tensor under its new name, and whether the alpha keys are those that the file had."""
    tensors: list[StoredTensor] = []
    alpha_as_before = True
    for update in work.updates:
        format_ = work.target.format
        if update.component == "text_encoder":
            assert work.target.text_encoder is not None
            format_ = work.target.text_encoder
        for role, tensor in update.tensors.items():
            if role != "alpha":
                shaped = _shaped(tensor, role, format_.spelling.suffixes.get(role, ""))
                tensors.append(shaped.renamed(format_.render(update.module, role)))
        alpha = _alpha(update, work)
        if alpha is not None:
            tensors.append(alpha.renamed(format_.render(update.module, "alpha")))
        alpha_as_before = alpha_as_before and alpha is update.tensors.get("alpha")
    if work.refusals:
        raise ValueError(f"The scales cannot be written: {_reasons(work.refusals)}.")
    return tensors, alpha_as_before


def _shaped(tensor: StoredTensor, role: str, suffix: str) -> StoredTensor:
    """A DoRA magnitude in the shape of its spelling: [out] for PEFT, [out, 1] for dora_scale."""
    if role != "magnitude" or (len(tensor.shape) == 2 and tensor.shape[0] == 1 != tensor.shape[1]):
        return tensor
    shape = (tensor.shape[0], 1) if suffix == "dora_scale" else (tensor.shape[0],)
    return derived(tensor.key, tensor.dtype, shape, lambda: tensor.load().reshape(shape))


def _alpha(update: LoraUpdate, work: _Work) -> StoredTensor | None:
    """The alpha tensor of an update in this target, if it has one."""
    place, own = work.target.alpha, update.tensors.get("alpha")
    if place not in ("always", "if_not_one"):
        return None
    if update.kind in ("diff", "diff_b") or (place == "if_not_one" and update.scale.is_one):
        return None
    if update.kind == "lokr" and update.rank is None:
        return None  # loaders ignore it; ai-toolkit writes 1e10 or infinity
    if own is not None and update.scale.source == "key" and update.scale.rank == update.rank:
        return own
    assert update.rank is not None
    scale = update.scale.exact
    exact = None if scale is None else scale * update.rank
    number = torch.tensor(
        update.scale.value * update.rank if exact is None else float(exact), dtype=torch.float32
    )
    if exact != Fraction(float(number)) and not work.options.allow_approximate:
        work.refusals.append(
            f"no fp32 alpha gives the scale {update.scale.value:.9g} exactly; --allow-approximate takes the "
            f"nearest ({update.module})"
        )
    return stored("alpha", number)


def _config(work: _Work) -> dict[str, object] | None:
    """The PEFT configuration of a target that keeps the scale in one."""
    if work.target.alpha not in ("metadata", "adapter_config"):
        return None
    return peft_config(work.updates, rounding=work.options.allow_approximate)


def _prefixed_json(config: Mapping[str, object]) -> str:
    return json.dumps(
        {f"transformer.{key}": value for key, value in config.items()}, indent=2, sort_keys=True
    )


def _warns(target: Target, work: _Work) -> bool:
    """A warning about the scale matters only where the scale is not 1."""
    return target.alpha != "metadata" or not all(update.scale.is_one for update in work.updates)


def _check_strict(work: _Work) -> None:
    if work.options.strict:
        work.refusals += [
            f"--strict allows new names only, but it would be {step.action} ({step.module})"
            for step in work.steps
            if step.action != "renamed"
        ]


def _reasons(refusals: Sequence[str]) -> str:
    """The different reasons, each with its first module and how many more there are."""
    groups: dict[str, list[str]] = {}
    for refusal_ in refusals:
        reason, _, module = refusal_.rpartition(" (")
        groups.setdefault(reason or refusal_, []).append(module.rstrip(")"))
    lines = []
    for reason, modules in list(groups.items())[:NUM_LISTED]:
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"{reason} ({modules[0]}{more})")
    left = len(groups) - NUM_LISTED
    return "; ".join(lines) + (f"; and {left} more reasons" if left > 0 else "")
