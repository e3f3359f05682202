"""The metadata of a converted file: what is still true is kept, what is not is dropped, nothing is copied
blindly."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from diffusers_qwenimage.lora.scales import METADATA_KEY
from diffusers_qwenimage.lora.updates import LoraUpdate

PROVENANCE_KEY = "diffusers_qwenimage.provenance"
# Hashes of the tensors or the file: wrong after any rewrite, and recomputed by the tools that use them.
HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
# What the factors are and how they are scaled, in the words of kohya's tools and LyCORIS.
STRUCTURE_KEYS = (
    "ss_network_alpha",
    "ss_network_dim",
    "ss_network_module",
    "ss_network_args",
    "lycoris_config",
)


def converted_metadata(source: Mapping[str, str], *, same_structure: bool) -> dict[str, str]:
    """The metadata of a file after its conversion, without what the target adds.

    Args:
        source: the metadata of the file that was read.
        same_structure: whether factors and alpha keys are the same as before.
    """
    dropped = {*HASH_KEYS, METADATA_KEY, PROVENANCE_KEY, *(() if same_structure else STRUCTURE_KEYS)}
    kept = {key: value for key, value in source.items() if key not in dropped}
    return {**kept, "format": "pt"}


def peft_config(updates: Sequence[LoraUpdate], *, rounding: bool = False) -> dict[str, object]:
    """The fields of a PEFT LoraConfig that give each update its rank and scale, and nothing else.

    Raises:
        ValueError: if an alpha is not exactly a float, and rounding it is not allowed.
    """
    rslora = bool(updates) and all(
        update.scale.rslora and update.rank == update.scale.rank for update in updates
    )
    ranks = {update.module: _rank(update) for update in updates}
    alphas = {update.module: _peft_alpha(update, rslora=rslora, rounding=rounding) for update in updates}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(value for module, value in alphas.items() if ranks[module] == rank).most_common(1)[0][0]
    config: dict[str, object] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }
    if rslora:
        config["use_rslora"] = True
    if any(update.kind == "dora" for update in updates):
        config["use_dora"] = True
    if any("up_bias" in update.tensors for update in updates):
        config["lora_bias"] = True
    return config


def _peft_alpha(update: LoraUpdate, *, rslora: bool, rounding: bool) -> int | float:
    """The lora_alpha that gives an update its scale."""
    if rslora:
        assert update.scale.alpha is not None
        exact: Fraction | None = Fraction(update.scale.alpha)
    else:
        scale = update.scale.exact
        exact = None if scale is None else scale * _rank(update)
    if exact is None or Fraction(float(exact)) != exact:
        if rounding:
            return update.scale.value * _rank(update)
        raise ValueError(
            f"{update.module}: no number is exactly its scale {update.scale.value:.9g} times its rank; "
            "--allow-approximate takes the nearest."
        )
    return int(exact) if exact.denominator == 1 else float(exact)


def _rank(update: LoraUpdate) -> int:
    assert update.rank is not None
    return update.rank
