"""What stays on the device and what streams, for a budget.

Every block keeps about the same fraction of its weights on the device, so that the link is busy all the time
and no block waits for more than the others. Groups of tensors become resident in order of the fraction of
their block that is then resident; blocks of equal fraction in an order that spreads them over the list. Where
there is no room for two whole blocks, parts of blocks (survey.py) come and go instead: the attention and the
two MLPs of a block of our transformer are of one size, and three slots for them take the memory of one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .mapped import buffer_bytes
from .survey import Block, Group, Survey, layout_bytes, num_bytes_of, survey

Source = Literal["pinned", "mapped"]
SOURCES = ("pinned", "mapped")
SEGMENT = 2 * 2**20  # the device's allocator rounds large pieces of memory up to this
MAX_SLOTS = 3


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One block.

    Attributes:
        name: of the block in the module.
        resident: names of the tensors that stay on the device.
        streamed: names of those that come for each visit.
        streamed_bytes: what a visit copies.
    """

    name: str
    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    streamed_bytes: int


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What streaming a module takes, in bytes.

    Attributes:
        vram_limit: the budget for the module's weights on the device; None: no limit.
        device: where the module computes.
        source: where streamed weights come from: "pinned" host memory, or the "mapped" file.
        num_slots: places on the device for what is on its way or at work; 0 if nothing streams.
        is_split: whether these are for parts of blocks, and not for whole ones.
        resident_bytes: weights that stay on the device.
        slot_bytes: all slots together.
        streamed_bytes: what one pass through all blocks copies to the device.
        pinned_bytes: host memory that is pinned.
        on_call_bytes: weights that stay in host memory and are used there, or come when they are called.
        smallest_bytes: the smallest budget that works, with one slot: nothing is copied while it computes.
        smallest_overlapping_bytes: the smallest where copies are hidden behind the work: with two slots for
            blocks, or three for parts of them.
        blocks: block by block, or part by part.
        on_call: names of the modules that stay in host memory.
    """

    vram_limit: int | None
    device: str
    source: Source
    num_slots: int
    is_split: bool
    resident_bytes: int
    slot_bytes: int
    streamed_bytes: int
    pinned_bytes: int
    on_call_bytes: int
    smallest_bytes: int
    smallest_overlapping_bytes: int
    blocks: tuple[BlockPlan, ...] = field(repr=False)
    on_call: tuple[str, ...] = field(repr=False)

    @property
    def device_bytes(self) -> int:
        """Weights on the device, slots included: at most the budget."""
        return self.resident_bytes + self.slot_bytes

    @property
    def host_bytes(self) -> int:
        """Weights in host memory (or in the mapped file)."""
        return self.streamed_bytes + self.on_call_bytes

    def seconds_per_pass(self, *, compute: float, link: float) -> float:
        """Expected time of one pass through all blocks.

        Args:
            compute: seconds that a pass takes with all weights resident.
            link: bytes per second from host memory to the device.
        """
        copying = self.streamed_bytes / link
        return compute + copying if self.num_slots == 1 else max(compute, copying)


def plan_stream(
    module: nn.Module,
    vram_limit: int | None,
    *,
    device: str = "cuda",
    blocks: Sequence[str] | None = None,
    on_call: Sequence[str] | None = None,
    source: Source = "pinned",
    num_slots: int | None = None,
    split: bool | None = None,
    surveys: "Surveys | None" = None,
) -> StreamPlan:
    """Plan streaming without touching the module; arguments as in `stream`.

    Args:
        surveys: `surveys_of` the module, for several plans of it; `blocks` and `on_call` are in them.

    Raises:
        ValueError: if the budget is too small (it says what the smallest is), or an argument makes no sense.
    """
    return make_plan(
        module,
        vram_limit,
        device=device,
        blocks=blocks,
        on_call=on_call,
        source=source,
        num_slots=num_slots,
        split=split,
        surveys=surveys,
    ).plan


@dataclass(frozen=True, kw_only=True)
class Surveys:
    """A module taken apart in every way that a plan may need.

    Attributes:
        streamed: if its blocks stream: as little as can be belongs on the device.
        split: if parts of blocks do.
        whole: if it fits as a whole, the largest first.
    """

    streamed: Survey
    split: Survey
    whole: tuple[Survey, ...]


def surveys_of(
    module: nn.Module, *, blocks: Sequence[str] | None = None, on_call: Sequence[str] | None = None
) -> Surveys:
    """Take a module apart, for several plans of it; arguments and errors as of `survey`."""
    ways: list[Sequence[str] | None] = [on_call] if on_call is not None else [(), None]
    return Surveys(
        streamed=survey(module, blocks=blocks, on_call=on_call),
        split=survey(module, blocks=blocks, on_call=on_call, split=True),
        whole=tuple(survey(module, blocks=blocks, on_call=way, large_on_host=False) for way in ways),
    )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A plan with the tensors themselves.

    Attributes:
        plan: for people.
        survey: the module.
        resident: per block, the large groups that stay on the device.
        streamed: per block, those that stream.
    """

    plan: StreamPlan
    survey: Survey
    resident: tuple[tuple[Group, ...], ...]
    streamed: tuple[tuple[Group, ...], ...]


def make_plan(
    module: nn.Module,
    vram_limit: int | None,
    *,
    device: str,
    blocks: Sequence[str] | None,
    on_call: Sequence[str] | None,
    source: Source,
    num_slots: int | None,
    split: bool | None = None,
    surveys: Surveys | None = None,
) -> Placement:
    """`plan_stream`, with the tensors."""
    _check(vram_limit, source, num_slots)
    surveys = surveys or surveys_of(module, blocks=blocks, on_call=on_call)
    smallest = _smallest(surveys, split)
    for whole in surveys.whole:
        everything = [len(block.large) for block in whole.blocks]
        if vram_limit is None or _device_bytes(whole, everything, 0) <= vram_limit:
            return _placement(whole, everything, vram_limit, device, source, 0, smallest)
    assert vram_limit is not None
    ways = _ways(surveys, num_slots, split)
    for parts, slots in ways:
        levels = _levels(parts, vram_limit, slots)
        if levels is not None:
            return _placement(parts, levels, vram_limit, device, source, slots, smallest)
    least = min(_least_bytes(parts, slots) for parts, slots in ways)
    raise ValueError(
        f"{vram_limit:,} bytes are too few for the weights of {type(module).__name__}: streaming them with "
        f"{num_slots or 1} slot(s) takes at least {least:,} bytes ({least / 2**30:.2f} GiB)."
    )


def _ways(surveys: Surveys, num_slots: int | None, split: bool | None) -> list[tuple[Survey, int]]:
    """What may come and go, and the slots for it, the best way first.

    With one slot nothing is copied beside the work: parts of blocks that overlap are better than that.
    """
    blocks = [(surveys.streamed, slots) for slots in _slot_numbers(num_slots)] if not split else []
    parts = [(surveys.split, slots) for slots in _slot_numbers(num_slots)] if split is not False else []
    return sorted(blocks + parts, key=lambda way: way[1] == 1)


def _slot_numbers(num_slots: int | None) -> Sequence[int]:
    return [num_slots] if num_slots else range(MAX_SLOTS, 0, -1)


def _smallest(surveys: Surveys, split: bool | None) -> tuple[int, int]:
    """The smallest budget that works, and the smallest with which copies are hidden behind the work."""
    ways = [(surveys.streamed, 2)] if not split else []
    ways += [(surveys.split, 3)] if split is not False else []
    one, enough = zip(
        *((_least_bytes(parts, 1), _least_bytes(parts, num_slots)) for parts, num_slots in ways), strict=True
    )
    return min(one), min(enough)


def _least_bytes(parts: Survey, num_slots: int) -> int:
    return _device_bytes(parts, [0] * len(parts.blocks), num_slots)


def _check(vram_limit: int | None, source: str, num_slots: int | None) -> None:
    if vram_limit is not None and vram_limit < 0:
        raise ValueError(f"vram_limit is {vram_limit}; give bytes, or None for no limit.")
    if source not in SOURCES:
        raise ValueError(f"There is no source {source!r}. Choose one of {', '.join(SOURCES)}.")
    if num_slots is not None and num_slots < 1:
        raise ValueError(f"num_slots is {num_slots}; at least 1 is needed, and 2 to copy while computing.")


def _levels(parts: Survey, limit: int, num_slots: int) -> list[int] | None:
    """How many large groups of each block are resident, as many as fit; None if the limit is too small."""
    levels = [0] * len(parts.blocks)
    best = list(levels) if _device_bytes(parts, levels, num_slots) <= limit else None
    resident = _device_bytes(parts, levels, 0)
    streamed = [block.last_bytes[0] for block in parts.blocks]
    for index in _upgrades(parts):
        block = parts.blocks[index]
        resident -= _slab_bytes(block, levels[index])
        levels[index] += 1
        resident += _slab_bytes(block, levels[index])
        streamed[index] = block.last_bytes[levels[index]]
        if resident + num_slots * rounded(max(streamed)) <= limit:
            best = list(levels)
        elif resident > limit:
            break
    return best


def _upgrades(parts: Survey) -> list[int]:
    """Indices of blocks, in the order in which each gets its next group resident."""
    order: list[tuple[float, float, int]] = []
    index = 0
    for blocks in parts.lists.values():
        for place, block in enumerate(blocks):
            total, so_far = max(num_bytes_of(block.large), 1), 0
            for group in block.large:
                so_far += num_bytes_of([group])
                order.append((so_far / total, _spread(place), index))
            index += 1
    return [index for _, _, index in sorted(order)]


def _spread(place: int) -> float:
    """0, 1, 2, 3... -> 0, 1/2, 1/4, 3/4...: any first part of this sequence is even over [0, 1)."""
    value, half = 0.0, 0.5
    while place:
        value += half * (place & 1)
        place, half = place >> 1, half / 2
    return value


def _device_bytes(parts: Survey, levels: Sequence[int], num_slots: int) -> int:
    pairs = list(zip(parts.blocks, levels, strict=True))
    resident = rounded(layout_bytes(parts.rest)) + sum(_slab_bytes(block, level) for block, level in pairs)
    largest = max(block.last_bytes[level] for block, level in pairs)
    return resident + num_slots * rounded(largest)


def _slab_bytes(block: Block, level: int) -> int:
    """What a block with `level` large groups keeps on the device, in two slabs."""
    return rounded(block.small_bytes) + rounded(block.first_bytes[level])


def _placement(
    parts: Survey,
    levels: Sequence[int],
    limit: int | None,
    device: str,
    source: Source,
    num_slots: int,
    smallest: tuple[int, int],
) -> Placement:
    pairs = list(zip(parts.blocks, levels, strict=True))
    resident = tuple(block.large[:level] for block, level in pairs)
    streamed = tuple(block.large[level:] for block, level in pairs)
    of_blocks = [block.last_bytes[level] for block, level in pairs]
    total = sum(of_blocks)
    plan = StreamPlan(
        vram_limit=limit,
        device=device,
        source=source,
        num_slots=num_slots if total else 0,
        is_split=parts.is_split and total > 0,
        resident_bytes=_device_bytes(parts, levels, 0),
        slot_bytes=num_slots * rounded(max(of_blocks)),
        streamed_bytes=total,
        pinned_bytes=total if source == "pinned" else buffer_bytes(max(of_blocks)),
        on_call_bytes=num_bytes_of(parts.on_host),
        smallest_bytes=smallest[0],
        smallest_overlapping_bytes=smallest[1],
        on_call=(*parts.on_call, *parts.gathered),
        blocks=tuple(
            BlockPlan(
                name=block.name,
                resident=_keys((*block.small, *kept)),
                streamed=_keys(sent),
                streamed_bytes=num_bytes,
            )
            for block, kept, sent, num_bytes in zip(parts.blocks, resident, streamed, of_blocks, strict=True)
        ),
    )
    return Placement(plan=plan, survey=parts, resident=resident, streamed=streamed)


def rounded(num_bytes: int) -> int:
    """What the device's allocator takes for a slab."""
    return num_bytes if num_bytes < SEGMENT // 2 else -(-num_bytes // SEGMENT) * SEGMENT


def _keys(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(member.key for group in groups for member in group)
