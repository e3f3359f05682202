"""A LoRA for a model in memory: PEFT's names for diffusers' `load_lora_adapter`, or the changed weight.

    adapter = to_peft(read_lora(path).updates)
    transformer.load_lora_adapter(adapter.state_dict, prefix="transformer", metadata=adapter.metadata)

LoKr stays LoKr where the whole file is LoKr (PEFT has a layer for it; a low-rank factor is multiplied out,
which is small), else LoKr and LoHa become plain factors if their rank is below that of the weight. What no
adapter of PEFT can express (full differences, DoRA per input column, OFT, ...) is refused with a way out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_qwenimage.lora.architectures import QWEN_IMAGE, Architecture
from diffusers_qwenimage.lora.factors import expand, expanded_rank, update_factors
from diffusers_qwenimage.lora.formats import DIFFUSERS
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.metadata import peft_config
from diffusers_qwenimage.lora.read import listing
from diffusers_qwenimage.lora.updates import LoraUpdate

PREFIX = "transformer"  # of the keys in PEFT's naming, as diffusers' pipelines have it
BAKE = "bake it into a checkpoint (`qwenimage lora bake`) and load that"


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter in PEFT's terms.

    Attributes:
        state_dict: `"transformer.<module>.lora_A.weight"`, ..., or `"...lokr_w1"` with scales inside.
        metadata: the fields of a `LoraConfig`, each with the prefix `transformer.`; None for LoKr, whose
            configuration diffusers takes from the shapes.
        shapes: the shape of the change, [out, in], by module.
        left_out: modules of the text encoder, which the pipelines do not change.
    """

    state_dict: dict[str, Tensor]
    metadata: dict[str, object] | None
    shapes: Mapping[str, tuple[int, ...]]
    left_out: tuple[str, ...]


def to_peft(updates: Sequence[LoraUpdate], architecture: Architecture = QWEN_IMAGE) -> PeftAdapter:
    """Updates of any file as one PEFT adapter; tensors are read.

    Raises:
        ValueError: if an update has no form there; the first few are listed with their reasons.
    """
    ours = [update for update in updates if update.component == "transformer"]
    left_out = tuple(update.module for update in updates if update.component != "transformer")
    ours = split_all(ours, architecture)
    if not ours:
        raise ValueError("It changes nothing in the transformer.")
    only_lokr = all(update.kind == "lokr" and "magnitude" not in update.tensors for update in ours)
    problems = [] if only_lokr else [problem for update in ours if (problem := _problem(update))]
    with_dora = [update.kind == "dora" for update in ours]
    if any(with_dora) and not all(with_dora):
        problems.append("some modules are DoRA and others are not, and a PEFT adapter is either one")
    if problems:
        unknown = {"glora", "oft", "ia3"} & {update.kind for update in ours}
        advice = "merge it into a checkpoint with the program that made it" if unknown else BAKE
        raise ValueError(f"It cannot be an adapter: {listing(problems)}. Instead, {advice}.")
    shapes = {update.module: tuple(update.shape or ()) for update in ours}
    if only_lokr:
        return PeftAdapter(state_dict=_lokr(ours), metadata=None, shapes=shapes, left_out=left_out)
    plain = [_plain(update) for update in ours]
    config = peft_config(plain, rounding=True)
    return PeftAdapter(
        state_dict=_factors(plain),
        metadata={f"{PREFIX}.{field}": value for field, value in config.items()},
        shapes=shapes,
        left_out=left_out,
    )


def changed_weight(weight: Tensor, update: LoraUpdate, strength: float = 1.0) -> Tensor:
    """The weight (or bias, for `diff_b`) with an update applied, accumulated in fp32 (fp64 for fp64).

    Args:
        weight: of any floating type and device; not changed.
        strength: a factor on the change; of DoRA on its low-rank part, as PEFT has it.

    Raises:
        ValueError: if the shapes differ, or the kind is not known how to apply (GLoRA, OFT, IA3).
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    base = weight.to(dtype)
    if update.shape is not None and tuple(update.shape) != tuple(weight.shape):
        raise ValueError(
            f"{update.module}: a change of shape {list(update.shape)} for a weight of {list(weight.shape)}; "
            "the LoRA is of another model."
        )
    left, right = (factor.to(weight.device, dtype) for factor in update_factors(update))
    low_rank = right.numel() > 0  # else the change is `left` itself
    changed = torch.addmm(base, left, right, alpha=strength) if low_rank else base.add(left, alpha=strength)
    if not _is_dora(update):
        return changed
    axis = 1 if update.magnitude_axis == "output" else 0
    magnitude = update.load("magnitude").to(weight.device, dtype)
    magnitude = magnitude.reshape(-1, 1) if axis == 1 else magnitude.reshape(1, -1)
    norm: Tensor = torch.linalg.vector_norm(changed, dim=axis, keepdim=True)
    return changed * (magnitude / norm)


def _is_dora(update: LoraUpdate) -> bool:
    return "magnitude" in update.tensors


def _problem(update: LoraUpdate) -> str:
    """Why an update cannot be part of a LoRA adapter; "" if it can."""
    where = f"({update.module})"
    if _is_dora(update):
        if update.kind != "dora":
            return f"a DoRA of {update.kind} factors {where}"
        if update.magnitude_axis == "input":
            return f"a DoRA magnitude per input column {where}"
        return ""
    if update.kind in ("lokr", "loha"):
        assert update.shape is not None
        full = min(update.shape)
        if expanded_rank(update) < full:
            return ""
        return f"{update.kind} beside other kinds, with the full rank {full} as plain factors {where}"
    return "" if update.kind in ("lora", "embedding") else f"{_NAMES.get(update.kind, update.kind)} {where}"


_NAMES = {
    "diff": "a full difference of a weight",
    "diff_b": "a difference of a bias",
    "set_weight": "a whole weight",
    "glora": "GLoRA",
    "oft": "OFT",
    "ia3": "IA3",
}


def _plain(update: LoraUpdate) -> LoraUpdate:
    if update.kind not in ("lokr", "loha"):
        return update
    expanded = expand(update)
    scale = replace(update.scale, alpha=update.scale.value * expanded.rank, rank=expanded.rank, rslora=False)
    return replace(update, kind="lora", tensors=expanded.tensors, scale=scale)


def _factors(updates: Sequence[LoraUpdate]) -> dict[str, Tensor]:
    """The tensors under PEFT's names; fp8 ones in bf16, which holds them exactly."""
    state = {}
    for update in updates:
        for role in update.tensors:
            if role == "alpha":
                continue
            tensor = update.load(role)
            tensor = tensor.bfloat16() if tensor.dtype.itemsize == 1 else tensor
            tensor = tensor.reshape(-1) if role == "magnitude" else tensor
            state[DIFFUSERS.render(update.module, role)] = tensor
    return state


def _lokr(updates: Sequence[LoraUpdate]) -> dict[str, Tensor]:
    """Whole LoKr factors in fp32, the scale in the first. PEFT decides by size which factors it would split,
    so only whole ones are sure to fit."""
    state = {}
    for update in updates:
        first, second = (_whole(update, name) for name in ("lokr_w1", "lokr_w2"))
        state[f"{PREFIX}.{update.module}.lokr_w1"] = (first * update.scale.value).float()
        state[f"{PREFIX}.{update.module}.lokr_w2"] = second.float()
    return state


def _whole(update: LoraUpdate, name: str) -> Tensor:
    if name in update.tensors:
        return update.load(name).double()
    return update.load(f"{name}_a").double() @ update.load(f"{name}_b").double()
