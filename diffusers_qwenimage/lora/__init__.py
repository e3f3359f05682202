"""LoRA files: read any format, prove what was read, write any format. Pure functions on state dicts.

    from diffusers_qwenimage.lora import convert_lora, merge_loras
    convert_lora("style.safetensors", "style_comfy.safetensors", "opensource")
    merge_loras([("style.safetensors", 0.7), ("person.safetensors", 1.0)], "both.safetensors")

Data: `updates` (one weight change, its tensors and scale), `architectures` (modules and their sizes),
`formats` (how each tool spells its keys), `targets` (what can be written, what is refused). Reading:
`sources` (local, Hub, ModelScope), `read`, `grouping` (kind and completeness), `scales`, `report`. Exact
arithmetic: `factors` (folding, expansion), `fused` (q, k and v as one), `verify` (equality in fp64). Writing:
`render` (names, scales, metadata of a target), `metadata`, `write` (one tensor at a time), `provenance` (the
way back, byte by byte), `convert` (all of it on files). Editing: `compose`, `merge`, `resize`, `extract`,
`bake`, `approximate` (the nearest low-rank factors). Elsewhere: `doctor` (known damage), `predict`,
`consumers`, `diffusers_rules` (what other programs make of a file), `apply` (a LoRA for a model in memory).
"""

from .bake import bake_loras
from .convert import convert_lora, convert_state_dict
from .doctor import diagnose, repair_lora
from .extract import extract_lora
from .factors import delta_weight
from .merge import merge_loras
from .read import read_lora, read_state_dict
from .render import Options
from .resize import RankRule, resize_lora
from .verify import compare_files

__all__ = [
    "Options",
    "RankRule",
    "bake_loras",
    "compare_files",
    "convert_lora",
    "convert_state_dict",
    "delta_weight",
    "diagnose",
    "extract_lora",
    "merge_loras",
    "read_lora",
    "read_state_dict",
    "repair_lora",
    "resize_lora",
]
