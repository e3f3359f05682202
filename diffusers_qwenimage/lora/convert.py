"""LoRA files from one format to another: rendered, written, read back, proved equal, and only then renamed.

conversion = convert_lora("style.safetensors", "style_kohya.safetensors", "kohya")
print(conversion.comparison.summary())
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from diffusers_qwenimage.files import read_header, replace_file, sync, write_text
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.metadata import PROVENANCE_KEY
from diffusers_qwenimage.lora.provenance import Source, make_record, restore
from diffusers_qwenimage.lora.read import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    LoraFile,
    checked,
    open_tensors,
    parse_tensors,
    read_lora,
    read_state_dict,
)
from diffusers_qwenimage.lora.render import Options, Rendered, Step, render
from diffusers_qwenimage.lora.targets import find_target
from diffusers_qwenimage.lora.updates import LoraUpdate
from diffusers_qwenimage.lora.verify import Comparison, compare_updates
from diffusers_qwenimage.lora.write import Progress, stream_safetensors

ORIGINAL = "original"
REVERSIBLE = ("renamed", "folded", "split", "fused")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did, and the proof.

    Attributes:
        target: name of the target, or "original".
        restored: whether the output is the file that the input was once made from, byte by byte.
        steps: what was done with each update; empty if restored.
        comparison: the weight changes of the output against those of the input.
        notes: what the user has to know.
        num_bytes: size of the written weights.
    """

    target: str
    restored: bool
    steps: tuple[Step, ...]
    comparison: Comparison
    notes: tuple[str, ...]
    num_bytes: int


def convert_lora(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    options: Options | None = None,
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a LoRA file as another format.

    Args:
        source: a .safetensors file or a PEFT adapter folder.
        output: where to write; a folder for the target "peft".
        to: the name of a target, or "original" for the file that the source was converted from.
        options: how far the conversion may go.
        base: a checkpoint to check the shapes against.
        progress: called with the bytes written and compared; twice the size of the source in all.

    Raises:
        ValueError: if the source is not understood, the target cannot hold it, or the written file differs.
            Nothing is left at `output` then.
    """
    options = options or Options()
    source, output = Path(source), Path(output)
    if source.resolve() == output.resolve():
        raise ValueError(f"{output} is the input; name another file.")
    file = read_lora(source, base=base)
    original = restore(file, to if to == ORIGINAL else find_target(to).name)
    if original is not None:
        return _write_original(file, original, output, to, progress)
    if to == ORIGINAL:
        raise ValueError(
            f"{source} has no record of an original that it still matches; name a format with --to."
        )
    rendered = render(file, find_target(to), options)
    rendered = replace(rendered, metadata={**rendered.metadata, **_provenance(source, file, rendered)})
    return write_rendered(rendered, output, options, progress)


def convert_state_dict(
    tensors: Mapping[str, Tensor],
    to: str,
    *,
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping[str, object] | None = None,
    options: Options | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Convert tensors in memory; returns tensors and metadata.

    Raises:
        ValueError: if the input is not understood or the target cannot hold it.
    """
    file = read_state_dict(tensors, metadata=metadata, adapter_config=adapter_config)
    rendered = render(file, find_target(to), options or Options())
    return {tensor.key: tensor.load() for tensor in rendered.tensors}, dict(rendered.metadata)


def write_rendered(
    rendered: Rendered,
    output: Path,
    options: Options,
    progress: Progress | None = None,
    *,
    max_bound: float = 0.0,
) -> Conversion:
    """Write what was rendered; it gets its name once its changes are proved equal to its source updates.

    Raises:
        ValueError: if the written file differs from `rendered.source_updates`: by more than `max_bound`
            (relative), unless the options allow approximation. Nothing is left at `output` then.
    """
    with _output(output, directory=rendered.target.directory) as weights:
        stream_safetensors(weights, rendered.tensors, rendered.metadata, progress=progress)
        config = rendered.adapter_config
        if config is not None:
            write_text(weights.parent / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        written = _read_back(weights, config)
        comparison = _compare(rendered.source_updates, written, progress)
        problem = _problem(comparison, options, max_bound)
        if problem:
            raise ValueError(f"{output} was not written: {problem}.")
        num_bytes = weights.stat().st_size
    return Conversion(
        target=rendered.target.name,
        restored=False,
        steps=rendered.steps,
        comparison=comparison,
        notes=rendered.notes,
        num_bytes=num_bytes,
    )


def _write_original(
    file: LoraFile, original: Source, output: Path, to: str, progress: Progress | None
) -> Conversion:
    config = original.record.adapter_config
    with _output(output, directory=config is not None) as weights:
        with weights.open("wb") as stream:
            for chunk in original.chunks():
                stream.write(chunk)
                if progress:
                    progress(len(chunk))
        if config is not None:
            write_text(weights.parent / ADAPTER_CONFIG, config)
        written = _read_back(weights, None if config is None else json.loads(config))
        comparison = _compare(file.updates, written, progress)
        num_bytes = weights.stat().st_size
    return Conversion(
        target=to, restored=True, steps=(), comparison=comparison, notes=(), num_bytes=num_bytes
    )


@contextmanager
def _output(path: Path, *, directory: bool) -> Iterator[Path]:
    """Yield the path to write the weights to; the file or the folder gets its name only on success."""
    if not directory:
        with replace_file(path) as temporary:
            yield temporary
        return
    if path.exists() and not (path / ADAPTER_MODEL).is_file():
        raise ValueError(f"{path} exists and is not a PEFT adapter folder; name a new folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.resolve().parent, prefix=f".{path.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary / ADAPTER_MODEL
        sync(temporary / ADAPTER_MODEL)
        if path.exists():
            for name in (ADAPTER_MODEL, ADAPTER_CONFIG):
                os.replace(temporary / name, path / name)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_back(weights: Path, config: Mapping[str, object] | None) -> LoraFile:
    header = read_header(weights)
    return checked(
        parse_tensors(
            open_tensors(weights, header),
            name="the written file",
            metadata=header.metadata,
            adapter_config=config,
        )
    )


def _compare(updates: Sequence[LoraUpdate], written: LoraFile, progress: Progress | None) -> Comparison:
    architecture = written.architecture
    return compare_updates(
        split_all(updates, architecture), split_all(written.updates, architecture), progress=progress
    )


def _problem(comparison: Comparison, options: Options, max_bound: float) -> str:
    """What is wrong with a written file, or ""."""
    if options.strict and not comparison.same_bits:
        return "--strict demands the same bits in every tensor"
    if comparison.exact or comparison.bound <= max_bound:
        return ""
    if options.allow_approximate and math.isfinite(comparison.bound):
        return ""
    return f"its weight changes differ from those of the input: {comparison.summary()}"


def _provenance(source: Path, file: LoraFile, rendered: Rendered) -> dict[str, str]:
    """The record of the source; with the way back if there is one."""
    weights = source / ADAPTER_MODEL if source.is_dir() else source
    config = None
    if file.adapter_config is not None:
        config = (weights.parent / ADAPTER_CONFIG).read_text(encoding="utf-8")
    reversible = all(step.action in REVERSIBLE for step in rendered.steps)
    kept = {update.component for update in rendered.source_updates}
    complete = kept == {update.component for update in file.updates}  # nothing was dropped on request
    return {
        PROVENANCE_KEY: make_record(
            weights, file, rendered.folded, config, reversible=reversible and complete
        )
    }
