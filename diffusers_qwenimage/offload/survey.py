"""What a module consists of, for streaming: its blocks, what is in them, and the rest.

A block is an item of a `ModuleList` whose items are of one class; blocks run one after the other, each as a
whole. Where even one of them is too large, the modules in it that are called as a whole take its place (its
attention, its MLPs). Some parts of a module need not be on the device at all: those that run rarely or never
(the modulation of our transformer when it is tabulated, an output layer, a vision tower) and large
embeddings, of which a forward reads a few rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from diffusers_qwenimage.projections import GROUPS

from .layout import Spec, layout_of

LARGE_BYTES = 256 * 2**20  # parts outside of the blocks from this size on can stay in host memory
LARGE_BESIDE_PARTS = 32 * 2**20  # the same where blocks are split: a few milliseconds of a step for memory
SMALL_SHARE = 256  # tensors of less than 1/256 of their block are resident: norms, biases, scales


@dataclass(frozen=True, kw_only=True)
class Member:
    """A parameter or buffer, by the module that owns it.

    Attributes:
        key: its name in the whole module.
        owner: the module that it hangs on.
        name: its name there.
    """

    key: str
    owner: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """The tensor that hangs there now."""
        found: Tensor | None = self.owner._parameters.get(self.name)
        if found is None:
            found = self.owner._buffers[self.name]
        assert found is not None
        return found

    @cached_property
    def spec(self) -> Spec:
        """Shape and type, as they were when first asked for: plans ask for them many times."""
        tensor = self.tensor
        return Spec(tuple(tensor.shape), tensor.dtype)


Group = tuple[Member, ...]  # tensors that stay together, and behind each other


def num_bytes_of(groups: Iterable[Group]) -> int:
    """Bytes of all members, without the gaps between them."""
    return sum(member.spec.num_bytes for group in groups for member in group)


def layout_bytes(groups: Iterable[Group]) -> int:
    """Bytes of a slab of these groups."""
    return layout_of([[member.spec for member in group] for group in groups]).num_bytes


@dataclass(frozen=True, kw_only=True)
class Block:
    """What comes and goes as a whole: a block, or a part of one.

    Attributes:
        name: in the whole module.
        module: whose weights these are.
        large: groups that may be streamed, the smallest first.
        small: groups that are not worth it, always resident.
    """

    name: str
    module: nn.Module
    large: tuple[Group, ...]
    small: tuple[Group, ...]

    @cached_property
    def first_bytes(self) -> tuple[int, ...]:
        """Of slabs of the first 0, 1, 2... large groups."""
        return tuple(layout_bytes(self.large[:count]) for count in range(len(self.large) + 1))

    @cached_property
    def last_bytes(self) -> tuple[int, ...]:
        """Of slabs of all but the first 0, 1, 2... large groups."""
        return tuple(layout_bytes(self.large[count:]) for count in range(len(self.large) + 1))

    @cached_property
    def small_bytes(self) -> int:
        """Of a slab of the small groups."""
        return layout_bytes(self.small)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A module taken apart.

    Attributes:
        lists: blocks that run in order, by the name of their list.
        rest: groups outside of blocks that belong on the device.
        on_call: modules whose weights stay in host memory and come to the device for a call, by name.
        gathered: embeddings that stay in host memory; rows are looked up there.
        is_split: whether parts of blocks stand for blocks.
    """

    lists: dict[str, tuple[Block, ...]]
    rest: tuple[Group, ...]
    on_call: dict[str, nn.Module]
    gathered: dict[str, nn.Module]
    is_split: bool

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all lists."""
        return tuple(block for blocks in self.lists.values() for block in blocks)

    @cached_property
    def on_host(self) -> tuple[Group, ...]:
        """What stays in host memory and does not stream."""
        aside = (*self.on_call.items(), *self.gathered.items())
        members = [member for name, module in aside for member in members_of(module, name)]
        return tuple((member,) for member in _new(members, set()))


def survey(
    module: nn.Module,
    *,
    blocks: Sequence[str] | None = None,
    on_call: Sequence[str] | None = None,
    large_on_host: bool = True,
    split: bool = False,
) -> Survey:
    """Take a module apart. Adapters of PEFT are left out: they are small and come along.

    Args:
        module: any module, on any device, meta too.
        blocks: names of lists of blocks, or of single blocks; None: those that `find_blocks` finds.
        on_call: names of submodules that stay in host memory, as seen from the module or from its blocks;
            None: what the module's class names in `_stream_on_call`.
        large_on_host: leave large parts outside of the blocks in host memory too: embeddings, output layers.
        split: take the modules that a block calls as a whole instead of blocks.

    Raises:
        ValueError: if there are no blocks, or no submodule of a given name.
    """
    lists = _lists(module, find_blocks(module) if blocks is None else blocks)
    patterns = getattr(module, "_stream_on_call", ()) if on_call is None else on_call
    aside = _aside(module, [name for items in lists.values() for name in items], patterns)
    unknown = [pattern for pattern in on_call or () if not any(_fits(name, pattern) for name in aside)]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} has no submodule {unknown[0]!r}, neither itself nor in a block."
        )
    seen: set[int] = set()
    for name, part in aside.items():
        _new(members_of(part, name), seen)
    surveyed = {
        list_name: tuple(_blocks(_parts(items) if split else items, aside, seen))
        for list_name, items in lists.items()
    }
    gathered: dict[str, nn.Module] = {}
    if large_on_host:
        for name, part in _large_leaves(module, seen, LARGE_BESIDE_PARTS if split else LARGE_BYTES):
            (gathered if type(part) is nn.Embedding else aside)[name] = part
            _new(members_of(part, name), seen)
    return Survey(
        lists={name: items for name, items in surveyed.items() if items},
        rest=tuple(_groups(_new(members_of(module, ""), seen))),
        on_call=aside,
        gathered=gathered,
        is_split=split,
    )


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the outermost lists of at least two modules of one class that hold weights.

    Raises:
        ValueError: if there are none.
    """
    found: list[str] = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        items = list(part)
        if len(items) > 1 and len({type(item) for item in items}) == 1 and _has_weights(items[0]):
            found.append(name)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no list of blocks. Name the modules to stream in `blocks`, or move "
            "the module as a whole."
        )
    return found


def members_of(module: nn.Module, prefix: str) -> Iterator[Member]:
    """Parameters and buffers, without those of adapters; `prefix` is the module's name in the whole."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield Member(key=f"{prefix}.{name}".lstrip("."), owner=module, name=name)
    for name, child in module._modules.items():
        if child is not None and (name == "base_layer" or not _is_adapted(module)):
            yield from members_of(child, f"{prefix}.{name}".lstrip("."))


def _is_adapted(module: nn.Module) -> bool:
    """Whether the module is a layer with adapters around it (of PEFT)."""
    return "base_layer" in module._modules and hasattr(module, "adapter_layer_names")


def _lists(module: nn.Module, names: Iterable[str]) -> dict[str, dict[str, nn.Module]]:
    """List name -> block name -> block; blocks that are named one by one make a list of their own."""
    lists: dict[str, dict[str, nn.Module]] = {}
    for name in names:
        try:
            part = module.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{type(module).__name__} has no submodule {name!r}.") from error
        if isinstance(part, nn.ModuleList | nn.Sequential):
            items = {f"{name}.{index}": item for index, item in part.named_children()}
            lists[name] = {key: item for key, item in items.items() if _has_weights(item)}
        else:
            lists.setdefault("", {})[name] = part
    if not any(lists.values()):
        raise ValueError("There is nothing to stream: the named lists hold no weights.")
    return lists


def _aside(module: nn.Module, blocks: Sequence[str], patterns: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(module.named_modules())
    names = [*patterns, *(f"{block}.{pattern}" for block in blocks for pattern in patterns)]
    return {name: known[name] for name in names if name in known and _has_weights(known[name])}


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _blocks(
    items: Mapping[str, nn.Module], aside: Mapping[str, nn.Module], seen: set[int]
) -> Iterator[Block]:
    for name, item in items.items():
        if not any(name == other or name.startswith(f"{other}.") for other in aside):
            yield _block(name, item, seen)


def _parts(items: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that blocks call, in the order in which they are registered; small ones are left out.

    A block with large tensors of its own stays whole.
    """
    parts: dict[str, nn.Module] = {}
    for name, item in items.items():
        total = _num_bytes(item)
        if any(tensor.nbytes * SMALL_SHARE >= total for tensor in item.parameters(recurse=False)):
            parts[name] = item
            continue
        pending = [(f"{name}.{child_name}", child) for child_name, child in item.named_children()]
        while pending:
            part_name, part = pending.pop(0)
            if isinstance(part, nn.ModuleList):  # is not called
                inside = [(f"{part_name}.{child_name}", child) for child_name, child in part.named_children()]
                pending = inside + pending
            elif _num_bytes(part) * SMALL_SHARE >= total:
                parts[part_name] = part
    return parts


def _num_bytes(module: nn.Module) -> int:
    return sum(member.spec.num_bytes for member in members_of(module, ""))


def _block(name: str, module: nn.Module, seen: set[int]) -> Block:
    groups = _groups(_new(members_of(module, name), seen))
    total = num_bytes_of(groups)

    def is_large(group: Group) -> bool:
        plain = all(type(member.tensor) in (Tensor, nn.Parameter) for member in group)
        return plain and num_bytes_of([group]) * SMALL_SHARE >= total

    return Block(
        name=name,
        module=module,
        large=tuple(sorted(filter(is_large, groups), key=lambda group: num_bytes_of([group]))),
        small=tuple(group for group in groups if not is_large(group)),
    )


def _large_leaves(module: nn.Module, seen: set[int], least: int) -> list[tuple[str, nn.Module]]:
    found = []
    for name, part in module.named_modules():
        if name and not part._modules:
            mine = _new(members_of(part, name), set(seen))
            if sum(member.spec.num_bytes for member in mine) >= least:
                found.append((name, part))
    return found


def _new(members: Iterable[Member], seen: set[int]) -> list[Member]:
    """Those whose tensors were not seen before (weights can be tied)."""
    new = []
    for member in members:
        if id(member.tensor) not in seen:
            seen.add(id(member.tensor))
            new.append(member)
    return new


def _groups(members: Sequence[Member]) -> list[Group]:
    """Queries, keys and values of a stream together, per kind of tensor; everything else alone."""
    together: dict[object, list[Member]] = {}
    for member in members:
        path = [part for part in member.key.split(".")[:-1] if part != "base_layer"]
        names = next((names for names in GROUPS if path and path[-1] in names), None)
        label: object = (*path[:-1], names, member.name) if names else member.key
        together.setdefault(label, []).append(member)
    groups: list[Group] = []
    for label, found in together.items():
        names = label[-2] if isinstance(label, tuple) else None
        alike = len({(member.spec.dtype, member.spec.shape[1:]) for member in found}) == 1
        if names is not None and len(found) == len(names) and alike:
            groups.append(tuple(sorted(found, key=lambda member: _place(member, names))))
        else:
            groups += [(member,) for member in found]
    return groups


def _place(member: Member, names: Sequence[str]) -> int:
    return next(names.index(part) for part in reversed(member.key.split(".")) if part in names)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
