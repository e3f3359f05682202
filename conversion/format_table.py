"""Write the tables of README.md in this folder from the code: `python conversion/format_table.py`.

A section of the README lies between `<!-- NAME -->` and `<!-- /NAME -->`. A test fails when one is out of
date.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffusers_qwenimage.files import write_text
from diffusers_qwenimage.lora.architectures import QWEN_IMAGE_21
from diffusers_qwenimage.lora.consumers import CONSUMERS
from diffusers_qwenimage.lora.formats import FORMATS
from diffusers_qwenimage.lora.predict import Prediction, predict
from diffusers_qwenimage.lora.read import LoraFile, parse_tensors
from diffusers_qwenimage.lora.targets import ALIASES, TARGETS, Target
from diffusers_qwenimage.lora.updates import stored

README = Path(__file__).with_name("README.md")
SAMPLES = Path(__file__).with_name("key_samples")
MODULE = "transformer_blocks.0.attn.to_q"
# Row of the table of kinds: its name, the kind in the code, and the entry of `Target.refused` that decides.
KINDS = (
    ("LoRA, alpha equal to the rank", "lora", None),
    ("LoRA, another alpha", "scaled", None),
    ("DoRA, magnitude per output row", "dora", "magnitude"),
    ("DoRA, magnitude per input column", "dora", "input_axis"),
    ("LoKr with a decomposed factor", "lokr", None),
    ("LoKr with two whole factors", "lokr_whole", None),
    ("LoHa", "loha", None),
    ("full difference of a linear", "diff", "diff"),
    ("difference of a bias or a norm", "diff_b", "diff_b"),
    ("bias of the up factor (PEFT)", "up_bias", "up_bias"),
    ("LoRA of an embedding (Layered)", "embedding", "embedding"),
    ("GLoRA, OFT, IA3", "glora", "glora"),
)


def formats_table() -> str:
    """Every format that is read."""
    rows = [
        (
            format_.name,
            f"`{format_.render(MODULE, 'down')}`"
            if format_.component == "transformer"
            else f"`{format_.render('model.layers.0.self_attn.q_proj', 'down')}`",
            format_.alpha,
            format_.writers,
            format_.damage or "",
        )
        for format_ in FORMATS
    ]
    return table(("format", "key of a down factor", "alpha", "written by", "damage"), rows)


def targets_table() -> str:
    """Every target that is written."""
    places = {
        "always": "key, always",
        "if_not_one": "key, where the scale is not 1",
        "none": "multiplied into a factor, if exact",
        "metadata": "`lora_adapter_metadata`",
        "adapter_config": "adapter_config.json",
    }
    rows = []
    for target in TARGETS.values():
        aliases = [alias for alias, name in ALIASES.items() if name == target.name]
        names = ", ".join(f"`{name}`" for name in (target.name, *aliases))
        module = "transformer_blocks.0.attn.to_qkv" if target.fused else MODULE
        example = f"`{target.format.render(module, 'down')}`"
        rows.append((names, example, places[target.alpha], target.readers, target.warning))
    return table(("`--to`", "key of a down factor", "scale", "read by", "note"), rows)


def kinds_table() -> str:
    """What each target makes of each kind."""
    rows = [
        (name, *(_cell(target, kind, reason) for target in TARGETS.values())) for name, kind, reason in KINDS
    ]
    return table(("kind", *TARGETS), rows)


def programs_table() -> str:
    """What each program makes of each key sample, without conversion."""
    head = ("key sample", *(f"{c.title}{'' if c.evidence == 'ran' else ' *'}" for c in CONSUMERS))
    rows = []
    for path in sorted(SAMPLES.glob("*.json")):
        sample = json.loads(path.read_text(encoding="utf-8"))
        file = sample_file(path.stem, sample["keys"])
        if file.architecture is QWEN_IMAGE_21:
            continue
        rows.append((path.stem, *(_outcome(p) for p in predict(file, CONSUMERS))))
    return table(head, rows)


def sample_file(name: str, keys: Mapping[str, Sequence[int]]) -> LoraFile:
    """A sample with every alpha half of the rank, so that an alpha that is dropped shows as 2x."""
    tensors = {}
    for key, shape in keys.items():
        if not key.endswith(".on_input"):
            value = torch.full(tuple(shape), 2.0) if key.endswith(".alpha") else torch.zeros(tuple(shape))
            tensors[key] = stored(key, value)
    return parse_tensors(tensors, name=name)


def _outcome(prediction: Prediction) -> str:
    words = {"exact": "yes", "nothing": "nothing", "error": "error", "unrecognised": "not recognised"}
    if prediction.verdict == "partly":
        if prediction.num_applied == prediction.num_updates:
            return "without magnitude"
        return f"{prediction.num_applied}/{prediction.num_updates}"
    if prediction.verdict == "strength":
        return "wrong strength" if prediction.strength is None else f"{prediction.strength:g}x"
    return words[prediction.verdict]


def _cell(target: Target, kind: str, reason: str | None) -> str:
    if kind == "lora":
        return "renamed"
    if kind == "scaled":
        return "renamed" if target.holds_alpha else "folded if exact"
    if kind in ("lokr", "loha"):
        return "renamed" if kind in target.kinds else "expanded"
    if kind == "lokr_whole":
        return "renamed" if "lokr" in target.kinds else "refused"
    if kind == "up_bias":
        return "refused" if "up_bias" in target.refused else "renamed"
    refused = reason in target.refused or "magnitude" in target.refused and kind == "dora"
    return "refused" if refused or kind not in target.kinds else "renamed"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SECTIONS = {
    "formats": formats_table,
    "targets": targets_table,
    "kinds": kinds_table,
    "programs": programs_table,
}


def updated(text: str) -> str:
    """The README with every section written anew; raises ValueError if a section is missing."""
    for name, build in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"README.md must hold the section {name} once.")
        content = build()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


if __name__ == "__main__":
    write_text(README, updated(README.read_text(encoding="utf-8")))
    sys.exit(0)
