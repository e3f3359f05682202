"""How each tool spells the keys of a LoRA file: one `Format` per writer, detected key by key.

A key is prefix + module + suffix. The prefix and the way the module is written (dotted or flattened) are the
format's; the suffix gives the role. LoRA factors have five spellings; the other kinds (LoKr, LoHa,
differences) have one each, which every format shares. So a file that mixes formats is read key by key, and a
new writer is one record.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from diffusers_qwenimage.lora.architectures import resolve
from diffusers_qwenimage.lora.updates import Component


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """The suffixes of low-rank factors; `{adapter}` stands for the name of a PEFT adapter."""

    name: str
    suffixes: Mapping[str, str]


def _suffix_pattern(suffix: str) -> re.Pattern[str]:
    escaped = re.escape(suffix).replace(r"\{adapter\}", r"(?P<adapter>[^.]+?)")
    return re.compile(rf"(?P<stem>.+)\.{escaped}")


PEFT = Spelling(
    name="lora_A",
    suffixes={
        "down": "lora_A.weight",
        "up": "lora_B.weight",
        "up_bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "embedding_down": "lora_embedding_A",
        "embedding_up": "lora_embedding_B",
    },
)
PEFT_NAMED = Spelling(
    name="lora_A.{adapter}",
    suffixes={
        "down": "lora_A.{adapter}.weight",
        "up": "lora_B.{adapter}.weight",
        "up_bias": "lora_B.{adapter}.bias",
        "embedding_down": "lora_embedding_A.{adapter}",
        "embedding_up": "lora_embedding_B.{adapter}",
    },
)
KOHYA = Spelling(
    name="lora_down",
    suffixes={"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"},
)
DIFFUSERS_OLD = Spelling(name="lora.down", suffixes={"down": "lora.down.weight", "up": "lora.up.weight"})
# What musubi-tuner's converter makes of ".lora_A.default.weight".
MUSUBI_BROKEN = Spelling(
    name="lora_down.{adapter}_weight",
    suffixes={"down": "lora_down.{adapter}_weight", "up": "lora_up.{adapter}_weight"},
)
SPELLINGS = (PEFT, KOHYA, DIFFUSERS_OLD, PEFT_NAMED, MUSUBI_BROKEN)

# Suffixes that say nothing about the spelling of the factors. Several may mean the same role.
SHARED_SUFFIXES = {
    "alpha": "alpha",
    "dora_scale": "magnitude",  # LyCORIS, OneTrainer
    "lora_magnitude_vector": "magnitude",  # PEFT
    "lora_magnitude_vector.weight": "magnitude",  # OneTrainer DIFFUSERS
    "lora_magnitude_vector.default.weight": "magnitude",  # PEFT state_dict()
    "magnitude": "magnitude",  # ai-toolkit
    "lora_mid.weight": "mid",
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "set_weight": "set_weight",
    "oft_blocks": "oft_blocks",
    "rescale": "oft_rescale",
    **{f"{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2")},
    "bm.weight": "glora_bm",
    "on_input": "ia3_on_input",
    "scalar": "scalar",
    "weight": "ia3_weight",
}
_MAX_SUFFIX_PARTS = 3  # "lora_magnitude_vector.default.weight"


@dataclass(frozen=True, kw_only=True)
class ParsedKey:
    """What a key says: the module (canonical path), the role of the tensor, and how it was spelled."""

    module: str
    role: str
    component: Component
    prefix: str
    flat: bool
    spelling: Spelling | None
    adapter: str | None


@dataclass(frozen=True, kw_only=True)
class Format:
    """The spelling of one family of writers.

    Attributes:
        name: short name, used in reports.
        writers: the tools that write it.
        prefix: what stands before the module.
        flat: whether the dots of the module path are underscores.
        spelling: the suffixes of the factors.
        alpha: where its writers keep the scale.
        damage: what is wrong with such a file, where it is the result of a mistake.
        component: the model that the prefix speaks of.
    """

    name: str
    writers: str
    prefix: str
    spelling: Spelling
    alpha: str
    flat: bool = False
    damage: str = ""
    component: Component = "transformer"

    def parse(self, key: str) -> ParsedKey | None:
        """Take a key apart; None if it is not of this format or names no module of any architecture."""
        if not key.startswith(self.prefix):
            return None
        for stem, role, spelling, adapter in _split_suffix(key):
            if not stem.startswith(self.prefix) or spelling not in (None, self.spelling):
                continue
            if role == "ia3_weight" and not self.flat:  # dotted, it is a weight of a full checkpoint
                continue
            name = stem[len(self.prefix) :]
            module = resolve(name, flat=self.flat, text_encoder=self.component == "text_encoder")
            if module is not None:
                return ParsedKey(
                    module=module,
                    role=role,
                    component=self.component,
                    prefix=self.prefix,
                    flat=self.flat,
                    spelling=spelling,
                    adapter=adapter,
                )
        return None

    def render(self, module: str, role: str, adapter: str = "default") -> str:
        """Spell the key of a module's tensor; raises ValueError for a role that no key can express."""
        suffix = self.spelling.suffixes.get(role) or _shared_suffix(role)
        stem = module.replace(".", "_") if self.flat else module
        return f"{self.prefix}{stem}.{suffix.replace('{adapter}', adapter)}"


@lru_cache(maxsize=4096)
def _split_suffix(key: str) -> tuple[tuple[str, str, Spelling | None, str | None], ...]:
    """Every (stem, role, spelling, adapter) that a key may be read as, the most specific first."""
    found: list[tuple[str, str, Spelling | None, str | None]] = []
    parts = key.split(".")
    for number in range(min(len(parts) - 1, _MAX_SUFFIX_PARTS), 0, -1):
        stem, suffix = ".".join(parts[:-number]), ".".join(parts[-number:])
        found += [(stem, role, spelling, None) for role, spelling in _plain_suffixes().get(suffix, ())]
    for role, spelling, pattern in _named_suffixes():
        if match := pattern.fullmatch(key):
            found.append((match["stem"], role, spelling, match["adapter"]))
    return tuple(found)


@cache
def _plain_suffixes() -> dict[str, list[tuple[str, Spelling | None]]]:
    """Suffix -> the roles that it may mean, those of a spelling first."""
    table: dict[str, list[tuple[str, Spelling | None]]] = {}
    for spelling in SPELLINGS:
        for role, suffix in spelling.suffixes.items():
            if "{adapter}" not in suffix:
                table.setdefault(suffix, []).append((role, spelling))
    for suffix, role in SHARED_SUFFIXES.items():
        table.setdefault(suffix, []).append((role, None))
    return table


@cache
def _named_suffixes() -> tuple[tuple[str, Spelling, re.Pattern[str]], ...]:
    """The suffixes that hold the name of an adapter."""
    return tuple(
        (role, spelling, _suffix_pattern(suffix))
        for spelling in SPELLINGS
        for role, suffix in spelling.suffixes.items()
        if "{adapter}" in suffix
    )


def _shared_suffix(role: str) -> str:
    for suffix, name in SHARED_SUFFIXES.items():
        if name == role:
            return suffix
    raise ValueError(f"No key expresses the role {role!r}.")


DIFFSYNTH = Format(
    name="diffsynth",
    writers="DiffSynth-Studio training (with --remove_prefix_in_ckpt) and image-to-LoRA",
    prefix="",
    spelling=PEFT_NAMED,
    alpha="none, always equal to the rank",
)
DIFFSYNTH_BARE = Format(
    name="diffsynth-bare",
    writers="DiffSynth-Studio's early --align_to_opensource_format, OneTrainer ORIGINAL",
    prefix="",
    spelling=PEFT,
    alpha="key (OneTrainer) or none",
)
OPENSOURCE = Format(
    name="opensource",
    writers="Qwen-Image-Lightning releases",
    prefix="",
    spelling=KOHYA,
    alpha="key",
)
DIFFUSERS = Format(
    name="diffusers",
    writers="diffusers save_lora_weights, SimpleTuner, OneTrainer DIFFUSERS",
    prefix="transformer.",
    spelling=PEFT,
    alpha="metadata lora_adapter_metadata",
)
DIFFUSERS_NAMED = Format(
    name="diffusers-named",
    writers="PEFT state_dict() with a prefix",
    prefix="transformer.",
    spelling=PEFT_NAMED,
    alpha="none",
    damage="the name of the PEFT adapter was left in the keys; diffusers cannot read it",
)
DIFFUSERS_OLD_KEYS = Format(
    name="diffusers-old",
    writers="FlyMyAI trainer, LightX2V-train (attention)",
    prefix="transformer.",
    spelling=DIFFUSERS_OLD,
    alpha="none",
)
ONETRAINER_LEGACY = Format(
    name="onetrainer-legacy",
    writers="OneTrainer LEGACY",
    prefix="transformer.",
    spelling=KOHYA,
    alpha="key",
)
PEFT_DIRECTORY = Format(
    name="peft",
    writers="PEFT save_pretrained",
    prefix="base_model.model.",
    spelling=PEFT,
    alpha="adapter_config.json",
)
PEFT_DIRECTORY_NAMED = Format(
    name="peft-named",
    writers="PEFT state_dict()",
    prefix="base_model.model.",
    spelling=PEFT_NAMED,
    alpha="none",
    damage="the name of the PEFT adapter was left in the keys; PEFT cannot read it",
)
COMFYUI = Format(
    name="comfyui",
    writers="ai-toolkit, diffusion-pipe, SimpleTuner comfyui, OneTrainer COMFY, musubi-tuner convert_lora",
    prefix="diffusion_model.",
    spelling=PEFT,
    alpha="key or none",
)
COMFYUI_DOWN = Format(
    name="comfyui-down",
    writers="ComfyUI LoraSave, KJNodes, LightX2V extractor",
    prefix="diffusion_model.",
    spelling=KOHYA,
    alpha="key or none",
)
COMFYUI_NAMED = Format(
    name="comfyui-named",
    writers="PEFT state_dict() with a prefix",
    prefix="diffusion_model.",
    spelling=PEFT_NAMED,
    alpha="none",
)
KOHYA_FLAT = Format(
    name="kohya",
    writers="musubi-tuner, OneTrainer KOHYA",
    prefix="lora_unet_",
    flat=True,
    spelling=KOHYA,
    alpha="key",
)
MUSUBI_CONVERTED = Format(
    name="musubi-broken",
    writers="musubi-tuner convert_lora on a file with adapter names",
    prefix="lora_unet_",
    flat=True,
    spelling=MUSUBI_BROKEN,
    alpha="key",
    damage="musubi-tuner's converter left the name of the PEFT adapter in the keys; no loader reads it",
)
LORA_TRANSFORMER = Format(
    name="lora-transformer",
    writers="tools of the FLUX era",
    prefix="lora_transformer_",
    flat=True,
    spelling=KOHYA,
    alpha="key",
    damage="the prefix lora_transformer_ is not read by any loader of Qwen-Image",
)
LYCORIS = Format(
    name="lycoris",
    writers="LyCORIS, SimpleTuner LyCORIS, ai-toolkit LoKr (old)",
    prefix="lycoris_",
    flat=True,
    spelling=KOHYA,
    alpha="key",
)
TEXT_ENCODER_KOHYA = Format(
    name="text-encoder-kohya",
    writers="OneTrainer KOHYA, text encoder",
    prefix="lora_te_",
    flat=True,
    spelling=KOHYA,
    alpha="key",
    component="text_encoder",
)
TEXT_ENCODER_COMFYUI = Format(
    name="text-encoder-comfyui",
    writers="OneTrainer COMFY, text encoder",
    prefix="text_encoders.qwen25_7b.transformer.",
    spelling=PEFT,
    alpha="key",
    component="text_encoder",
)
TEXT_ENCODER_LEGACY = Format(
    name="text-encoder-legacy",
    writers="OneTrainer LEGACY, text encoder",
    prefix="text_encoder.",
    spelling=KOHYA,
    alpha="key",
    component="text_encoder",
)
TEXT_ENCODER_DIFFUSERS = Format(
    name="text-encoder-diffusers",
    writers="OneTrainer DIFFUSERS, text encoder",
    prefix="text_encoder.",
    spelling=PEFT,
    alpha="none",
    component="text_encoder",
)


def _damaged(name: str, writers: str, prefix: str, damage: str) -> tuple[Format, ...]:
    """The formats of a prefix that should not be there, one for each common spelling."""
    return tuple(
        Format(
            name=f"{name}{suffix}",
            writers=writers,
            prefix=prefix,
            spelling=spelling,
            alpha="key or none",
            damage=damage,
        )
        for spelling, suffix in ((PEFT_NAMED, ""), (PEFT, "-bare"), (KOHYA, "-down"))
    )


DAMAGED_PREFIXES = (
    *_damaged(
        "diffsynth-pipe",
        "DiffSynth-Studio training without --remove_prefix_in_ckpt",
        "pipe.dit.",
        "the prefix pipe.dit. was not removed; no loader reads it",
    ),
    *_damaged(
        "double-prefix",
        "a prefix added twice",
        "transformer.transformer.",
        "the prefix transformer. is there twice; no loader reads it",
    ),
    *_damaged(
        "checkpoint-prefix",
        "tools that keep the prefix of a full checkpoint",
        "model.diffusion_model.",
        "the prefix model.diffusion_model. is that of a full checkpoint; no LoRA loader reads it",
    ),
)

# In the order in which they are tried. Of several formats with one prefix, the first takes keys without
# spelling.
FORMATS = (
    DIFFSYNTH,
    DIFFSYNTH_BARE,
    OPENSOURCE,
    DIFFUSERS,
    DIFFUSERS_NAMED,
    DIFFUSERS_OLD_KEYS,
    ONETRAINER_LEGACY,
    PEFT_DIRECTORY,
    PEFT_DIRECTORY_NAMED,
    COMFYUI,
    COMFYUI_DOWN,
    COMFYUI_NAMED,
    KOHYA_FLAT,
    MUSUBI_CONVERTED,
    LORA_TRANSFORMER,
    LYCORIS,
    *DAMAGED_PREFIXES,
    TEXT_ENCODER_KOHYA,
    TEXT_ENCODER_COMFYUI,
    TEXT_ENCODER_LEGACY,
    TEXT_ENCODER_DIFFUSERS,
)


def parse_key(key: str) -> tuple[Format, ParsedKey] | None:
    """The first format that reads the key, and what it reads; None if none does."""
    for format_ in FORMATS:
        if parsed := format_.parse(key):
            return format_, parsed
    return None


def format_of(prefix: str, spelling: Spelling) -> Format | None:
    """The format with this prefix and spelling."""
    return next((f for f in FORMATS if f.prefix == prefix and f.spelling is spelling), None)
