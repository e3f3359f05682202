"""From the tensors of one module to its updates: which kind they are, whether they are complete, at which
scale."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers_qwenimage.lora.formats import Format, ParsedKey
from diffusers_qwenimage.lora.scales import ScaleRules, scale_from_key
from diffusers_qwenimage.lora.updates import (
    LOHA_ROLES,
    LOKR_ROLES,
    Component,
    Kind,
    LoraUpdate,
    Scale,
    StoredTensor,
    change_shape,
    unit_scale,
)


@dataclass(frozen=True, kw_only=True)
class Module:
    """The tensors that a file has for one module, by role, with the format and the parts of each key."""

    path: str
    component: Component
    tensors: dict[str, StoredTensor]
    formats: dict[str, tuple[Format, ParsedKey]]


# The kind, the roles that it must have, and those that it may have besides.
_KINDS: tuple[tuple[Kind, tuple[str, ...], tuple[str, ...]], ...] = (
    ("lora", ("down", "up"), ("up_bias", "alpha", "magnitude")),
    ("embedding", ("embedding_down", "embedding_up"), ("alpha",)),
    ("lokr", (), (*LOKR_ROLES, "alpha", "magnitude")),
    ("loha", LOHA_ROLES, ("alpha", "magnitude")),
    ("glora", ("glora_a1", "glora_a2", "glora_b1", "glora_b2"), ("glora_bm", "alpha")),
    ("oft", ("oft_blocks",), ("oft_rescale", "alpha")),
    ("ia3", ("ia3_weight",), ("ia3_on_input",)),
    ("set_weight", ("set_weight",), ()),
    ("diff", ("diff",), ()),
    ("diff_b", ("diff_b",), ()),
)
_CONVOLUTION_ROLES = ("mid", "lokr_t1", "lokr_t2", "hada_t1", "hada_t2", "glora_bm")
_WEIGHT_KINDS = ("lora", "dora", "embedding", "lokr", "loha", "glora", "oft", "ia3", "set_weight", "diff")


def updates_of_module(
    module: Module, rules: ScaleRules, problems: list[str], *, read_values: bool
) -> list[LoraUpdate]:
    """The updates of a module; incomplete, contradicting or left-over tensors are added to `problems`."""
    tensors = dict(module.tensors)
    for role in _CONVOLUTION_ROLES:
        if role in tensors:
            problems.append(f"{tensors.pop(role).key} belongs to a convolution, and this model has none")
    updates = []
    for kind, required, optional in _KINDS:
        own = {role: tensors[role] for role in (*required, *optional) if role in tensors}
        if not any(role in own for role in required or LOKR_ROLES):
            continue
        for role in own:
            del tensors[role]
        if update := _update(kind, own, required, module, rules, problems, read_values):
            updates.append(update)
    problems += [f"{tensor.key} stands alone" for tensor in tensors.values()]
    weight_kinds = [update.kind for update in updates if update.kind in _WEIGHT_KINDS]
    if len(weight_kinds) > 1:
        problems.append(f"{module.path} is changed twice, by {' and '.join(weight_kinds)}")
    return updates


def _update(
    kind: Kind,
    tensors: dict[str, StoredTensor],
    required: tuple[str, ...],
    module: Module,
    rules: ScaleRules,
    problems: list[str],
    read_values: bool,
) -> LoraUpdate | None:
    problem = _missing(kind, tensors, required) or _misfit(kind, tensors)
    if problem:
        problems.append(f"{module.path}: {problem}")
        return None
    return LoraUpdate(
        module=module.path,
        kind="dora" if kind == "lora" and "magnitude" in tensors else kind,
        tensors=tensors,
        scale=_scale(kind, tensors, module, rules, problems, read_values),
        format=next(module.formats[role][0].name for role in (*required, *tensors) if role in tensors),
        component=module.component,
    )


def _missing(kind: Kind, tensors: Mapping[str, StoredTensor], required: tuple[str, ...]) -> str:
    missing = [role for role in required if role not in tensors]
    if kind == "lokr":
        for name in ("lokr_w1", "lokr_w2"):
            parts = [role for role in (f"{name}_a", f"{name}_b") if role in tensors]
            if name in tensors and parts:
                return f"{name} is there both whole and as factors"
            if name not in tensors and len(parts) < 2:
                missing.append(name if not parts else f"the other factor of {name}")
    if not missing:
        return ""
    have = next(iter(tensors.values()))
    if kind == "lora" and missing == ["up"] and "up_bias" not in tensors:
        return f"{have.key} has no partner (lora_B is missing; ai-toolkit's full-rank files have only lora_A)"
    return f"{have.key} has no partner; missing: {', '.join(missing)}"


def _misfit(kind: Kind, tensors: Mapping[str, StoredTensor]) -> str:
    """What is wrong with the shapes of the tensors among themselves."""
    shapes = {role: tensor.shape for role, tensor in tensors.items()}
    for role, shape in shapes.items():
        if 0 in shape:
            return f"{tensors[role].key} is empty, shape {list(shape)}"
        if not tensors[role].dtype.is_floating_point and role not in ("alpha", "ia3_on_input"):
            return f"{tensors[role].key} holds {tensors[role].dtype}, which is not a type of weights"
        if role in _MATRICES and len(shape) != 2:
            return f"{tensors[role].key} must be a matrix, got shape {list(shape)}"
    for left, right in _INNER_AXES:
        if left in shapes and right in shapes and shapes[left][1] != shapes[right][0]:
            return (
                f"{tensors[left].key} {list(shapes[left])} and {tensors[right].key} {list(shapes[right])} "
                "do not multiply: their ranks differ"
            )
    return _outer_misfit(kind, tensors)


def _outer_misfit(kind: Kind, tensors: Mapping[str, StoredTensor]) -> str:
    shapes = {role: tensor.shape for role, tensor in tensors.items()}
    if kind == "loha":
        first = shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
        second = shapes["hada_w2_a"][0], shapes["hada_w2_b"][1]
        if first != second or shapes["hada_w1_a"][1] != shapes["hada_w2_a"][1]:
            return f"the two products of LoHa differ in shape or rank: {list(first)} and {list(second)}"
    shape = change_shape(kind, tensors)
    if shape is None or len(shape) != 2:
        return ""
    out, width = shape
    if "magnitude" in shapes and shapes["magnitude"] not in ((out,), (out, 1), (1, width)):
        key = tensors["magnitude"].key
        return f"{key} {list(shapes['magnitude'])} fits neither the rows nor the columns of [{out}, {width}]"
    if "up_bias" in shapes and shapes["up_bias"] != (out,):
        return f"{tensors['up_bias'].key} must have shape [{out}], got {list(shapes['up_bias'])}"
    return ""


def _scale(
    kind: Kind,
    tensors: Mapping[str, StoredTensor],
    module: Module,
    rules: ScaleRules,
    problems: list[str],
    read_values: bool,
) -> Scale:
    if kind in ("diff", "diff_b", "set_weight", "ia3", "oft"):
        return unit_scale()
    rank = next((tensors[role].shape[axis] for role, axis in _SCALE_AXES if role in tensors), None)
    if rank is None:
        return rules.whole_lokr(module.path)
    if "alpha" in tensors:
        return scale_from_key(tensors["alpha"], rank, problems, read_values=read_values)
    if module.component == "text_encoder":
        return unit_scale(rank)
    return rules.without_key(module.path, rank, problems)


_INNER_AXES = (
    ("up", "down"),
    ("embedding_up", "embedding_down"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
)
_MATRICES = {role for pair in _INNER_AXES for role in pair} | {"lokr_w1", "lokr_w2"}
# LyCORIS takes the rank of LoKr from the second factor, and from the first where the second is whole.
_SCALE_AXES = (
    ("down", 0),
    ("embedding_down", 0),
    ("lokr_w2_b", 0),
    ("lokr_w1_b", 0),
    ("hada_w1_b", 0),
    ("glora_a2", 0),
)
