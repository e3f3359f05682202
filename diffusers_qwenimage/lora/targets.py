"""What a LoRA file can be written as: the spelling, where the scale goes, and what each target cannot hold.

A target promises that the tool it is for applies the same change of the weights. What that tool ignores or
reads differently is refused with the reason, even if a key could be written for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffusers_qwenimage.lora import formats
from diffusers_qwenimage.lora.formats import Format
from diffusers_qwenimage.lora.updates import Kind, LoraUpdate

AlphaPlace = Literal["always", "if_not_one", "none", "metadata", "adapter_config"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One way to write a file.

    Attributes:
        name: the name on the command line.
        readers: the tools that apply such a file exactly.
        format: the spelling of the keys.
        alpha: where the scale goes: an alpha key (always, or only where the scale is not 1), nowhere (it is
            multiplied into a factor, if that is exact), `lora_adapter_metadata`, or adapter_config.json.
        kinds: kinds that are written as they are.
        refused: why other kinds cannot be written, by kind; "magnitude", "input_axis" and "up_bias" stand for
            those tensors.
        text_encoder: the spelling of text encoder keys, where the target has one.
        fused: whether q, k and v are written as one module.
        directory: whether the target is a folder.
        warning: what a user of the file has to know.
        dora_warning: the same for a file with DoRA magnitudes.
    """

    name: str
    readers: str
    format: Format
    alpha: AlphaPlace
    kinds: frozenset[Kind] = frozenset({"lora"})
    refused: Mapping[str, str] = field(default_factory=dict)
    text_encoder: Format | None = None
    fused: bool = False
    directory: bool = False
    warning: str = ""
    dora_warning: str = ""

    @property
    def holds_alpha(self) -> bool:
        """Whether any scale can be written without touching a tensor."""
        return self.alpha != "none"


_NEEDS_BASE = "is relative to the base weights, which the file does not hold"
_ONLY_LORA: dict[str, str] = {
    "diff": "a full difference has no exact low-rank form",
    "diff_b": "a difference of a bias or a norm has no LoRA form",
    "embedding": "a LoRA of an embedding is read by PEFT and diffusers only",
    "glora": f"GLoRA {_NEEDS_BASE}",
    "oft": f"OFT {_NEEDS_BASE}",
    "ia3": f"IA3 {_NEEDS_BASE}",
    "set_weight": "it replaces a weight instead of changing it",
    "up_bias": "only PEFT and diffusers read a bias of the up factor",
}
_DROPS_DORA = "loads the file as a plain LoRA and ignores the DoRA magnitude"
_NO_INPUT_AXIS = "a DoRA magnitude per input column exists in OneTrainer and LyCORIS only"

OPENSOURCE = Target(
    name="opensource",
    readers="diffusers, DiffSynth-Studio, ComfyUI, InvokeAI, OneTrainer: the spelling that all read",
    format=formats.OPENSOURCE,
    alpha="always",
    refused={**_ONLY_LORA, "magnitude": f"diffusers {_DROPS_DORA}"},
)
DIFFSYNTH = Target(
    name="diffsynth",
    readers="DiffSynth-Studio (inference and --lora_checkpoint), diffusers from 0.36, ComfyUI",
    format=formats.DIFFSYNTH,
    alpha="none",
    refused={**_ONLY_LORA, "magnitude": f"DiffSynth-Studio {_DROPS_DORA}"},
)
DIFFSYNTH_BARE = Target(
    name="diffsynth-bare",
    readers="DiffSynth-Studio, ComfyUI; what its early --align_to_opensource_format wrote",
    format=formats.DIFFSYNTH_BARE,
    alpha="none",
    refused={**_ONLY_LORA, "magnitude": f"DiffSynth-Studio {_DROPS_DORA}"},
    warning="diffusers ignores this spelling without an error; use opensource for a file that others load",
)
DIFFUSERS = Target(
    name="diffusers",
    readers="diffusers",
    format=formats.DIFFUSERS,
    alpha="metadata",
    kinds=frozenset({"lora", "dora", "embedding"}),
    refused={
        **{role: reason for role, reason in _ONLY_LORA.items() if role not in ("up_bias", "embedding")},
        "input_axis": _NO_INPUT_AXIS,
    },
    warning="the scale is in lora_adapter_metadata, which only diffusers reads; ComfyUI and DiffSynth-Studio "
    "use the wrong strength where it is not 1; use opensource for them",
)
PEFT = Target(
    name="peft",
    readers="PEFT (PeftModel.from_pretrained)",
    format=formats.PEFT_DIRECTORY,
    alpha="adapter_config",
    kinds=frozenset({"lora", "dora", "embedding"}),
    refused={
        **{role: reason for role, reason in _ONLY_LORA.items() if role not in ("up_bias", "embedding")},
        "input_axis": _NO_INPUT_AXIS,
    },
    directory=True,
)
COMFYUI = Target(
    name="comfyui",
    readers="ComfyUI, ai-toolkit; diffusers from 0.42 (earlier ones drop the alpha)",
    format=formats.COMFYUI,
    alpha="if_not_one",
    kinds=frozenset({"lora", "lokr", "loha", "diff", "diff_b"}),
    refused={
        **{role: reason for role, reason in _ONLY_LORA.items() if role not in ("diff", "diff_b")},
        "magnitude": "ComfyUI divides by the norm of the base weight, DoRA by that of the changed one",
    },
    text_encoder=formats.TEXT_ENCODER_COMFYUI,
)
KOHYA = Target(
    name="kohya",
    readers="musubi-tuner, OneTrainer, ComfyUI, diffusers, InvokeAI",
    format=formats.KOHYA_FLAT,
    alpha="always",
    kinds=frozenset({"lora", "dora", "lokr", "loha"}),
    refused=_ONLY_LORA,
    dora_warning="OneTrainer and LyCORIS apply this DoRA as it was trained; musubi-tuner and ComfyUI do not",
    text_encoder=formats.TEXT_ENCODER_KOHYA,
)
NUNCHAKU = Target(
    name="nunchaku",
    readers="runtimes with fused to_qkv and add_qkv_proj (nunchaku)",
    format=formats.DIFFSYNTH_BARE,
    alpha="none",
    refused={**_ONLY_LORA, "magnitude": "a fused runtime has no DoRA"},
    fused=True,
    warning="only runtimes with fused projections read this file",
)

TARGETS = {
    target.name: target
    for target in (OPENSOURCE, DIFFSYNTH, DIFFSYNTH_BARE, DIFFUSERS, PEFT, COMFYUI, KOHYA, NUNCHAKU)
}
ALIASES = {"portable": "opensource", "musubi": "kohya", "nunchaku-fused": "nunchaku", "comfy": "comfyui"}


def find_target(name: str) -> Target:
    """The target of that name or alias; raises ValueError with the list otherwise."""
    target = TARGETS.get(ALIASES.get(name, name))
    if target is None:
        raise ValueError(f"Unknown target {name!r}; choose one of {', '.join((*TARGETS, *ALIASES))}.")
    return target


def refusal(target: Target, update: LoraUpdate) -> str:
    """Why the target cannot hold an update in any form; "" if it can, as it is or expanded."""
    if update.component == "text_encoder" and target.text_encoder is None:
        return "it changes the text encoder, and this target has no keys for that"
    if update.kind in target.refused:
        return target.refused[update.kind]
    if update.magnitude_axis is not None:
        if "magnitude" in target.refused:
            return target.refused["magnitude"]
        if update.magnitude_axis == "input" and "input_axis" in target.refused:
            return target.refused["input_axis"]
        if update.kind not in target.kinds:
            return "a DoRA of LoKr or LoHa factors has no plain form"
    if "up_bias" in update.tensors and "up_bias" in target.refused:
        return target.refused["up_bias"]
    return ""
