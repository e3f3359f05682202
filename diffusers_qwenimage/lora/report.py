"""What a LoRA file holds, as data and as text: formats, kinds, ranks, scales, types, coverage, problems.

Everything but the scales comes from the header. Scales that are in the data are read from a local file; of a
file of which only the header is known they are reported as unknown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from diffusers_qwenimage.lora.architectures import relative_name
from diffusers_qwenimage.lora.formats import FORMATS
from diffusers_qwenimage.lora.provenance import read_record
from diffusers_qwenimage.lora.read import NUM_LISTED, LoraFile
from diffusers_qwenimage.lora.updates import LoraUpdate

MAX_VALUE_LENGTH = 100  # of a metadata value in a report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Facts about a file; every mapping counts updates (or keys, for formats).

    Attributes:
        name: where the file came from.
        architecture: name of the architecture.
        dimensions: the sizes that the shapes imply.
        published_size: whether the hidden width is that of the published model; None if it is not known.
        formats: number of keys per format.
        kinds, ranks, scales, scale_sources, dtypes: number of updates each.
        modules: number of blocks that each module is changed in.
        num_keys, num_updates, num_bytes, num_parameters: totals.
        original_format: the format that the file was converted from by this package.
        metadata: shortened values.
        problems, notes: see `LoraFile`.
    """

    name: str
    architecture: str
    dimensions: Mapping[str, int]
    published_size: bool | None
    formats: Mapping[str, int]
    kinds: Mapping[str, int]
    ranks: Mapping[str, int]
    scales: Mapping[str, int]
    scale_sources: Mapping[str, int]
    dtypes: Mapping[str, int]
    modules: Mapping[str, int]
    num_keys: int
    num_updates: int
    num_bytes: int
    num_parameters: int
    original_format: str | None
    metadata: Mapping[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return asdict(self)


def report(file: LoraFile) -> Report:
    """Count what a file holds."""
    record = read_record(file.metadata)
    hidden, published = file.dimensions.get("hidden"), file.architecture.published.get("hidden")
    tensors = file.tensors.values()
    return Report(
        name=file.name,
        architecture=file.architecture.name,
        dimensions=dict(sorted(file.dimensions.items())),
        published_size=None if hidden is None or published is None else hidden == published,
        formats=dict(file.formats),
        kinds=_count(update.kind for update in file.updates),
        ranks=_count(str(update.rank) for update in file.updates if update.rank is not None),
        scales=_count(_scale(update) for update in file.updates),
        scale_sources=_count(update.scale.source for update in file.updates),
        dtypes=_count(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        modules=_count(_family(update) for update in file.updates),
        num_keys=len(file.tensors),
        num_updates=len(file.updates),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        num_parameters=sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in tensors),
        original_format=record.format if record else None,
        metadata={key: _shortened(value) for key, value in file.metadata.items()},
        problems=file.problems,
        notes=file.notes,
    )


def report_lines(facts: Report) -> list[str]:
    """The report for people."""
    size = {True: ", the published model", False: ", not the published one", None: ""}[facts.published_size]
    mebibytes, depth = facts.num_bytes / 2**20, facts.dimensions.get("depth", 0)
    hidden = facts.dimensions.get("hidden", "unknown")
    lines = [
        f"{facts.name}: {facts.num_updates} updates, {facts.num_keys} tensors, {mebibytes:.1f} MiB",
        f"architecture  {facts.architecture}, {depth} blocks, hidden width {hidden}{size}",
        f"formats       {_counts(facts.formats)}",
        *(f"              {name}: {_writers(name)}" for name in facts.formats),
        f"kinds         {_counts(facts.kinds)}",
        f"ranks         {_counts(facts.ranks)}",
        f"scales        {_counts(facts.scales)} (from {_counts(facts.scale_sources)})",
        f"types         {_counts(facts.dtypes)}",
        f"modules       {_counts(facts.modules)}",
    ]
    if facts.original_format:
        lines.append(
            f"converted     from {facts.original_format} by this package; --to original writes that file"
        )
    lines += [f"note          {note}" for note in facts.notes]
    lines += [f"problem       {problem}" for problem in facts.problems[:NUM_LISTED]]
    if len(facts.problems) > NUM_LISTED:
        lines.append(f"problem       and {len(facts.problems) - NUM_LISTED} more")
    return lines


def _count(items: Iterable[str]) -> dict[str, int]:
    return dict(Counter(items).most_common())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x {number}" for name, number in counts.items()) or "none"


def _scale(update: LoraUpdate) -> str:
    return "unknown" if update.scale.alpha is None else f"{update.scale.value:.6g}"


def _family(update: LoraUpdate) -> str:
    name = relative_name(update.module)
    return name if update.component == "transformer" else f"text encoder {name}"


def _writers(name: str) -> str:
    return next(format_.writers for format_ in FORMATS if format_.name == name)


def _shortened(value: str) -> str:
    return (
        value
        if len(value) <= MAX_VALUE_LENGTH
        else f"{value[:MAX_VALUE_LENGTH]}... ({len(value)} characters)"
    )
