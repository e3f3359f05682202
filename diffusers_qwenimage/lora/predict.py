"""What each program makes of a LoRA file: whether it loads, at which strength, and what to convert it to.

A program is described by the rules of its loader: which prefixes and spellings it accepts, whose alpha it
reads, what it does with the rest. Predictions follow from the rules and the keys of the file; no table of
results is stored. The rules were checked against runs of the programs' own code on one-block files where
`evidence` says "ran"; where it says "read", they come from the source alone.

Not compared: the arithmetic of a program (a product in bf16 costs 3e-3 everywhere).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffusers_qwenimage.lora.architectures import QWEN_IMAGE, block_index
from diffusers_qwenimage.lora.formats import parse_key
from diffusers_qwenimage.lora.read import LoraFile
from diffusers_qwenimage.lora.targets import find_target, refusal
from diffusers_qwenimage.lora.updates import LoraUpdate

Verdict = Literal["exact", "strength", "partly", "nothing", "error", "unrecognised"]
Evidence = Literal["ran", "read"]
Fate = Literal["applied", "unscaled", "no magnitude", "lost"]


@dataclass(frozen=True, kw_only=True)
class Trait:
    """How a file spells one update.

    Attributes:
        update: the update.
        prefix, flat: what stands before the module, and whether that is flattened.
        spelling: the suffixes of its factors: "lora_A", "lora_A.{adapter}", "lora_down", "lora.down", or ""
            for kinds that have one spelling only.
        adapter: the name of a PEFT adapter in the keys.
        magnitude: the suffix of a DoRA magnitude, "" without one.
    """

    update: LoraUpdate
    prefix: str
    flat: bool
    spelling: str
    adapter: str | None
    magnitude: str

    @property
    def has_alpha(self) -> bool:
        """Whether there is an alpha key."""
        return "alpha" in self.update.tensors

    @property
    def fused(self) -> bool:
        """Whether the module is a fused projection, which only fused runtimes have."""
        return QWEN_IMAGE.parts(self.update.module) is not None

    @property
    def top_level(self) -> bool:
        """Whether the module is outside the blocks."""
        return block_index(self.update.module) is None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a program will do with a file.

    Attributes:
        consumer: name and version.
        verdict: exact; strength (all of it, at another strength); partly; nothing (without an error); error;
            unrecognised.
        strength: the factor on what the file means, where it is known and the same in all modules.
        num_applied, num_updates: of the updates of the transformer.
        detail: one sentence.
        evidence: whether the rules were checked by running the program.
        target: what to convert the file to for this program; "" if it is fine or nothing helps.
    """

    consumer: str
    verdict: Verdict
    strength: float | None
    num_applied: int
    num_updates: int
    detail: str
    evidence: Evidence
    target: str


@dataclass(frozen=True, kw_only=True)
class KeyRules:
    """A loader that looks at each key by itself.

    Attributes:
        prefixes, flat_prefixes: what may stand before a dotted, a flattened module.
        spellings: of LoRA factors.
        adapters: names of PEFT adapters that may stand in a key; None for any.
        kinds: other kinds that are applied as they are meant.
        alpha: spellings whose alpha key is read.
        magnitudes: suffixes of DoRA magnitudes that are applied as PEFT and LyCORIS do.
        flat_top: flattened modules outside the blocks that are found; None for all.
        one_spelling: whether the first key decides which spelling is read.
        when_nothing: what happens if no key is accepted.
        failures: conditions that stop the loader: (predicate of a trait, message).
    """

    prefixes: frozenset[str]
    flat_prefixes: frozenset[str] = frozenset()
    spellings: frozenset[str]
    adapters: frozenset[str] | None = frozenset({"default"})
    kinds: frozenset[str] = frozenset()
    alpha: frozenset[str] = frozenset({"lora_A", "lora_A.{adapter}", "lora_down", "lora.down", ""})
    magnitudes: frozenset[str] = frozenset()
    flat_top: frozenset[str] | None = None
    one_spelling: bool = False
    when_nothing: tuple[Verdict, str] = ("nothing", "no key is recognised; the file changes nothing")
    failures: Sequence[tuple[Callable[[Trait], bool], str]] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a loader does with each update, or why it stops."""

    fates: Sequence[Fate] = ()
    stopped: tuple[Verdict, str] | None = None
    factors: Sequence[float] = field(default=())  # strengths beside those that the fates imply
    when_nothing: tuple[Verdict, str] = ("nothing", "no key is recognised; the file changes nothing")
    when_partly: str = "the other keys are skipped"


Load = Callable[[Sequence[Trait], Mapping[str, str]], Outcome]


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A program and its version, the rules of its loader, and the targets it reads, the best first.

    `mixed_rank_targets` are those that it reads where modules have different ranks, if that matters.
    """

    name: str
    version: str
    load: Load
    evidence: Evidence
    targets: tuple[str, ...] = ("opensource",)
    mixed_rank_targets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}".strip()


def predict(file: LoraFile, consumers: Sequence[Consumer]) -> list[Prediction]:
    """What each program will do with a file, from its header alone if need be."""
    traits = [trait(update) for update in file.updates if update.component == "transformer"]
    return [_predict(consumer, traits, file.metadata) for consumer in consumers]


def trait(update: LoraUpdate) -> Trait:
    """How the keys of an update are spelled."""
    roles = [role for role in update.tensors if role not in ("alpha", "magnitude")]
    parsed = parse_key(update.tensors[roles[0]].key)
    assert parsed is not None
    _, key = parsed
    magnitude = update.tensors.get("magnitude")
    return Trait(
        update=update,
        prefix=key.prefix,
        flat=key.flat,
        spelling=key.spelling.name if key.spelling else "",
        adapter=key.adapter,
        magnitude=_magnitude_suffix(magnitude.key) if magnitude else "",
    )


def key_loader(rules: KeyRules) -> Load:
    """The loader that follows these rules."""

    def load(traits: Sequence[Trait], metadata: Mapping[str, str]) -> Outcome:
        for fails, message in rules.failures:
            if any(fails(t) for t in traits):
                return Outcome(stopped=("error", message))
        first = min(traits, key=lambda t: min(tensor.key for tensor in t.update.tensors.values()))
        return Outcome(
            fates=[
                "lost" if rules.one_spelling and _family(t) != _family(first) else _fate(t, rules)
                for t in traits
            ],
            when_nothing=rules.when_nothing,
        )

    return load


def _fate(trait_: Trait, rules: KeyRules) -> Fate:
    prefixes = rules.flat_prefixes if trait_.flat else rules.prefixes
    update = trait_.update
    if trait_.prefix not in prefixes or trait_.fused:
        return "lost"
    if (
        trait_.flat
        and trait_.top_level
        and rules.flat_top is not None
        and update.module not in rules.flat_top
    ):
        return "lost"
    if trait_.adapter is not None and rules.adapters is not None and trait_.adapter not in rules.adapters:
        return "lost"
    if update.kind in ("lora", "dora"):
        if trait_.spelling not in rules.spellings:
            return "lost"
    elif update.kind not in rules.kinds and not (update.kind == "lokr" and _whole_lokr(update, rules)):
        return "lost"
    if trait_.magnitude and trait_.magnitude not in rules.magnitudes:
        return "no magnitude"
    source = update.scale.source
    read = source == "default" or (source == "key" and trait_.spelling in rules.alpha)
    return "applied" if read or update.scale.is_one else "unscaled"


def _whole_lokr(update: LoraUpdate, rules: KeyRules) -> bool:
    return "lokr of whole factors" in rules.kinds and update.rank is None


def _predict(consumer: Consumer, traits: Sequence[Trait], metadata: Mapping[str, str]) -> Prediction:
    outcome = consumer.load(traits, metadata) if traits else Outcome()
    verdict, detail, strength = _judge(traits, outcome)
    fine = verdict == "exact"
    num_applied = 0 if outcome.stopped else sum(fate != "lost" for fate in outcome.fates)
    return Prediction(
        consumer=consumer.title,
        verdict=verdict,
        strength=1.0 if fine else strength,
        num_applied=num_applied,
        num_updates=len(traits),
        detail=detail,
        evidence=consumer.evidence,
        target="" if fine else _target(consumer, traits),
    )


def _judge(traits: Sequence[Trait], outcome: Outcome) -> tuple[Verdict, str, float | None]:
    if outcome.stopped:
        return (*outcome.stopped, None)
    fates, total = outcome.fates, len(traits)
    lost = sum(fate == "lost" for fate in fates)
    if lost == total:
        return (*outcome.when_nothing, None)
    if lost:
        return "partly", f"{total - lost} of {total} modules are loaded; {outcome.when_partly}", None
    if "no magnitude" in fates:
        return "partly", "the DoRA magnitude is not applied as it was trained", None
    factors = list(outcome.factors) or [1.0] * total
    unknown = False
    for index, (item, fate) in enumerate(zip(traits, fates, strict=True)):
        if fate == "unscaled":
            scale = item.update.scale
            unknown = unknown or scale.alpha is None
            factors[index] *= 1.0 if scale.alpha is None else 1 / scale.value
    if unknown:
        return "strength", "the alpha keys are ignored: rank / alpha times too strong", None
    if all(factor == 1 for factor in factors):
        return "exact", "loads exactly", 1.0
    low, high = min(factors), max(factors)
    span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return "strength", f"loads at {span} times the strength", low if low == high else None


def _target(consumer: Consumer, traits: Sequence[Trait]) -> str:
    """The first target of the program that can hold the file."""
    mixed = len({item.update.rank for item in traits}) > 1
    for name in consumer.mixed_rank_targets or consumer.targets if mixed else consumer.targets:
        target = find_target(name)
        if all(not refusal(target, item.update) for item in traits):
            return name
    return ""


def _family(trait_: Trait) -> str:
    """The spelling without the name of an adapter."""
    return trait_.spelling.removesuffix(".{adapter}")


def _magnitude_suffix(key: str) -> str:
    for name in ("lora_magnitude_vector.default.weight", "lora_magnitude_vector.weight"):
        if key.endswith(f".{name}"):
            return name
    return key.rpartition(".")[2]
