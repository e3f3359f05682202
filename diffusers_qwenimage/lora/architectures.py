"""Tables of the modules that a LoRA may change, and the sizes that these have.

Sizes are symbols ("hidden", "4*hidden", "256"), because a file is checked against the width that it implies
itself: the published model has a hidden width of 3072 and 60 blocks, test models are narrow. A flattened name
(`transformer_blocks_0_attn_to_q`) is looked up in the same table, never guessed from its underscores.

Sources: `QwenImageTransformer2DModel` and `QwenImage21Transformer2DModel` of diffusers 0.42.1. Qwen-Image 2.1
is listed so that its files are recognised; its shapes are not checked.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

_BLOCK = re.compile(r"(transformer_blocks|model\.layers)\.(0|[1-9]\d{0,4})\.(.+)")
_FLAT_BLOCK = re.compile(r"(transformer_blocks|model_layers)_(0|[1-9]\d{0,4})_(.+)")
Shape = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The modules of a model: relative names in a block, and names outside the blocks, with their sizes.

    Attributes:
        name: short name, used in reports and on the command line.
        title: the models that have this architecture.
        blocks: path of the list of blocks.
        block_linears, top_linears: name to ("out", "in").
        block_norms, top_norms: name to the size of the weight.
        embeddings: name to ("rows", "width").
        fused: name of a fused projection in a block to the names of its parts, in order.
        published: the sizes of the published model, with "depth".
    """

    name: str
    title: str
    blocks: str
    block_linears: Mapping[str, Shape]
    top_linears: Mapping[str, Shape] = field(default_factory=dict)
    block_norms: Mapping[str, Shape] = field(default_factory=dict)
    top_norms: Mapping[str, Shape] = field(default_factory=dict)
    embeddings: Mapping[str, Shape] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    published: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def block_modules(self) -> dict[str, Shape]:
        """Relative name of everything in a block: linears, norms, fused projections."""
        fused = {name: (f"{len(parts)}*hidden", "hidden") for name, parts in self.fused.items()}
        return {**self.block_linears, **self.block_norms, **fused}

    @cached_property
    def top_modules(self) -> dict[str, Shape]:
        """Name of everything outside the blocks."""
        return {**self.top_linears, **self.top_norms, **self.embeddings}

    @cached_property
    def _flat(self) -> dict[str, str]:
        return {name.replace(".", "_"): name for name in (*self.block_modules, *self.top_modules)}

    def sizes(self, module: str) -> Shape | None:
        """The symbolic sizes of a module by its dotted path, or None if there is no such module."""
        match = _BLOCK.fullmatch(module)
        if match and match[1] == self.blocks:
            return self.block_modules.get(match[3])
        return self.top_modules.get(module)

    def unflatten(self, name: str) -> str | None:
        """The dotted path of a flattened name, or None if there is no such module."""
        match = _FLAT_BLOCK.fullmatch(name)
        if match and match[1] == self.blocks.replace(".", "_"):
            relative = self._flat.get(match[3])
            return f"{self.blocks}.{match[2]}.{relative}" if relative in self.block_modules else None
        top = self._flat.get(name)
        return top if top in self.top_modules else None

    def linears(self, depth: int | None = None) -> list[str]:
        """Paths of all linears of a model with `depth` blocks (default: the published one)."""
        depth = self.published["depth"] if depth is None else depth
        blocks = [f"{self.blocks}.{index}.{name}" for index in range(depth) for name in self.block_linears]
        return blocks + list(self.top_linears)

    def parts(self, module: str) -> tuple[str, ...] | None:
        """Paths of the projections that a fused module consists of; None if it is not fused."""
        match = _BLOCK.fullmatch(module)
        names = self.fused.get(match[3]) if match else None
        return tuple(f"{self.blocks}.{match[2]}.{name}" for name in names) if match and names else None


def block_index(module: str) -> int | None:
    """The number of the block that a path lies in; None outside the blocks."""
    match = _BLOCK.fullmatch(module)
    return int(match[2]) if match else None


def relative_name(module: str) -> str:
    """The path without the block: `"attn.to_q"`; the path itself outside the blocks."""
    match = _BLOCK.fullmatch(module)
    return match[3] if match else module


def infer_dimensions(
    architecture: Architecture, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> tuple[dict[str, int], list[str]]:
    """Find the sizes that the shapes of weight changes imply, and the modules that contradict the others.

    Args:
        shapes: (module, shape) with the shape of the weight, or of the bias as `(out,)`.

    Returns:
        Each symbol with the value that most modules imply, with "depth"; and one sentence per misfit.
    """
    listed = [
        (module, sizes, shape)
        for module, shape in shapes
        if (sizes := architecture.sizes(module)) is not None and all(sizes)
    ]
    votes: dict[str, Counter[int]] = {}
    for _, sizes, shape in listed:
        for size, actual in zip(sizes, shape, strict=False):
            factor, symbol = _split(size)
            if symbol and actual % factor == 0:
                votes.setdefault(symbol, Counter())[actual // factor] += 1
    dimensions = {symbol: max(counts, key=lambda n: (counts[n], n)) for symbol, counts in votes.items()}
    problems = []
    for module, sizes, shape in listed:
        expected = tuple(_evaluate(size, dimensions) for size in sizes)[: len(shape)]
        if len(shape) > len(sizes) or expected != shape:
            problems.append(
                f"{module}: a change of shape {list(shape)} does not fit {list(expected)}, which the other "
                f"modules imply (hidden width {dimensions.get('hidden', 'unknown')})"
            )
    indices = [index for module, _, _ in listed if (index := block_index(module)) is not None]
    dimensions["depth"] = max(indices) + 1 if indices else 0
    problems += _depth_problems(architecture, dimensions)
    return dimensions, problems


def _depth_problems(architecture: Architecture, dimensions: Mapping[str, int]) -> list[str]:
    published = architecture.published
    if not published or dimensions.get("hidden") != published["hidden"]:
        return []
    if dimensions["depth"] <= published["depth"]:
        return []
    return [
        f"block {dimensions['depth'] - 1} is named, but {architecture.title} has {published['depth']} blocks"
    ]


def _split(size: str) -> tuple[int, str]:
    """("4*hidden") -> (4, "hidden"); a plain number has no symbol."""
    if size.isdigit():
        return int(size), ""
    factor, star, symbol = size.partition("*")
    return (int(factor), symbol) if star else (1, size)


def _evaluate(size: str, dimensions: Mapping[str, int]) -> int | None:
    factor, symbol = _split(size)
    if not symbol:
        return factor
    return factor * dimensions[symbol] if symbol in dimensions else None


_SQUARE = ("hidden", "hidden")
_QWEN_IMAGE_BLOCK: dict[str, Shape] = {
    "attn.to_q": _SQUARE,
    "attn.to_k": _SQUARE,
    "attn.to_v": _SQUARE,
    "attn.to_out.0": _SQUARE,
    "attn.add_q_proj": _SQUARE,
    "attn.add_k_proj": _SQUARE,
    "attn.add_v_proj": _SQUARE,
    "attn.to_add_out": _SQUARE,
    "img_mlp.net.0.proj": ("4*hidden", "hidden"),
    "img_mlp.net.2": ("hidden", "4*hidden"),
    "txt_mlp.net.0.proj": ("4*hidden", "hidden"),
    "txt_mlp.net.2": ("hidden", "4*hidden"),
    "img_mod.1": ("6*hidden", "hidden"),
    "txt_mod.1": ("6*hidden", "hidden"),
}
_QWEN_IMAGE_TOP: dict[str, Shape] = {
    "img_in": ("hidden", "latent"),
    "txt_in": ("hidden", "text"),
    "norm_out.linear": ("2*hidden", "hidden"),
    "proj_out": ("patch", "hidden"),
    "time_text_embed.timestep_embedder.linear_1": ("hidden", "256"),
    "time_text_embed.timestep_embedder.linear_2": _SQUARE,
}
QWEN_IMAGE = Architecture(
    name="qwen-image",
    title="Qwen-Image",
    blocks="transformer_blocks",
    block_linears=_QWEN_IMAGE_BLOCK,
    top_linears=_QWEN_IMAGE_TOP,
    block_norms={f"attn.norm_{name}": ("head",) for name in ("q", "k", "added_q", "added_k")},
    top_norms={"txt_norm": ("text",)},
    fused={
        "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    published={"hidden": 3072, "depth": 60, "latent": 64, "text": 3584, "patch": 64, "head": 128},
)
QWEN_IMAGE_EDIT = replace(QWEN_IMAGE, name="qwen-image-edit", title="Qwen-Image-Edit, -2509 and -2511")
QWEN_IMAGE_LAYERED = replace(
    QWEN_IMAGE,
    name="qwen-image-layered",
    title="Qwen-Image-Layered",
    embeddings={"time_text_embed.addition_t_embedding": ("2", "hidden")},
)
_UNCHECKED = ("", "")
_QWEN_IMAGE_21_ONLY = ("txt_in.in_layer", "txt_in.out_layer", "modulation.1")
QWEN_IMAGE_21 = Architecture(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1",
    blocks="transformer_blocks",
    block_linears={
        name: _UNCHECKED
        for name in (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
        )
    },
    top_linears={
        name: _UNCHECKED
        for name in (
            *_QWEN_IMAGE_21_ONLY,
            *("img_in", "norm_out.linear", "proj_out"),
            *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
        )
    },
)
TEXT_ENCODER = Architecture(
    name="qwen2.5-vl",
    title="the text encoder of Qwen-Image",
    blocks="model.layers",
    block_linears={
        name: _UNCHECKED
        for name in (
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    },
)
ARCHITECTURES = (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_LAYERED, QWEN_IMAGE_21)


def resolve(name: str, *, flat: bool, text_encoder: bool = False) -> str | None:
    """The dotted path of a module of any architecture, or None if no architecture has it."""
    for architecture in (TEXT_ENCODER,) if text_encoder else ARCHITECTURES:
        if flat and (dotted := architecture.unflatten(name)):
            return dotted
        if not flat and architecture.sizes(name) is not None:
            return name
    return None


def detect_architecture(modules: Iterable[str], metadata: Mapping[str, str]) -> Architecture:
    """The architecture of a file, from its modules and, where these fit several, its metadata."""
    modules = set(modules)
    if any(QWEN_IMAGE.sizes(name) is None and QWEN_IMAGE_21.sizes(name) is not None for name in modules):
        return QWEN_IMAGE_21
    if any(module in QWEN_IMAGE_LAYERED.embeddings for module in modules):
        return QWEN_IMAGE_LAYERED
    stated = " ".join(
        metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")
    ).lower()
    if "layered" in stated:
        return QWEN_IMAGE_LAYERED
    return QWEN_IMAGE_EDIT if "edit" in stated else QWEN_IMAGE
