"""Updates that a tool has made -> a LoRA file in any target's spelling, proved equal to what it should hold.

Merging, resizing, extracting and repairing all end here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffusers_qwenimage.lora.architectures import detect_architecture, infer_dimensions
from diffusers_qwenimage.lora.convert import Conversion, write_rendered
from diffusers_qwenimage.lora.read import LoraFile
from diffusers_qwenimage.lora.render import Options, render
from diffusers_qwenimage.lora.targets import find_target
from diffusers_qwenimage.lora.updates import LoraUpdate
from diffusers_qwenimage.lora.write import Progress

# What a scale that no fp32 number expresses may cost: half a unit of fp32 is 6e-8, in a factor and an alpha.
ROUNDING_OF_FP32 = 2e-7


def compose(updates: Sequence[LoraUpdate], *, name: str, metadata: Mapping[str, str]) -> LoraFile:
    """A `LoraFile` of updates that come from a computation instead of a file.

    Raises:
        ValueError: if their shapes contradict each other.
    """
    transformer = [update for update in updates if update.component == "transformer"]
    architecture = detect_architecture((update.module for update in transformer), metadata)
    shapes = [(update.module, update.shape) for update in transformer if update.shape is not None]
    dimensions, problems = infer_dimensions(architecture, shapes)
    if problems:
        raise ValueError(f"{name} would not fit together: {problems[0]}.")
    tensors = {tensor.key: tensor for update in updates for tensor in update.tensors.values()}
    return LoraFile(
        name=name,
        updates=tuple(updates),
        architecture=architecture,
        dimensions=dimensions,
        formats=dict(Counter(update.format for update in updates)),
        metadata=metadata,
        adapter_config=None,
        tensors=tensors,
        problems=(),
        notes=(),
    )


def write_composed(
    file: LoraFile,
    output: str | Path,
    to: str,
    *,
    metadata: Mapping[str, str],
    reference: Sequence[LoraUpdate] | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    max_bound: float = ROUNDING_OF_FP32,
) -> Conversion:
    """Write a composed file and prove it.

    Args:
        file: what is written.
        output: where to; a folder for the target "peft".
        to: name of a target.
        metadata: entries to add to those that survive of the file's own.
        reference: the changes that the written file must have; None means those of `file`.
        max_bound: the relative difference that passes.

    Raises:
        ValueError: if the target cannot hold it or the written file differs; nothing is left then.
    """
    options = options or Options()
    rendered = render(file, find_target(to), options)
    rendered = replace(rendered, metadata={**rendered.metadata, **metadata})
    if reference is not None:
        rendered = replace(rendered, source_updates=tuple(reference))
    return write_rendered(rendered, Path(output), options, progress, max_bound=max_bound)
