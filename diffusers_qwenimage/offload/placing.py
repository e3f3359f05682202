"""Putting weights where they will live: resident slabs on the device, slabs in host memory."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout, layout_of
from .memory import HostMemory, HostSlab, device_slab
from .plan import Placement
from .ring import Unit
from .survey import Group, Member

WORKERS = 8  # blocks that are copied to pinned memory at a time


class Progress:
    """Counts bytes and tells who wants to know."""

    def __init__(self, tell: Callable[[int, int], None] | None, total: int) -> None:
        self._tell = tell
        self._total = total
        self._done = 0

    def add(self, num_bytes: int) -> None:
        """So many more are done."""
        self._done += num_bytes
        if self._tell is not None:
            self._tell(min(self._done, self._total), self._total)


def place_existing(
    before: dict[str, Unit],
    placement: Placement,
    device: torch.device,
    progress: Progress,
    *,
    may_wait: bool = False,
) -> list[Unit]:
    """Move the weights of a module, block by block, so that nothing is held twice for long.

    Args:
        before: what streams already, by the name of the block; it is used up.
        placement: where weights go.
        device: where resident weights go.
        progress: is told.
        may_wait: leave blocks that were not pinned before where they are: they will be pinned later.

    Raises:
        ValueError: if a weight is on the meta device.
    """
    parts = placement.survey
    meta = next((m for group in all_groups(placement) for m in group if m.tensor.is_meta), None)
    if meta is not None:
        raise ValueError(f"{meta.key} is on the meta device: it has no values. Load it with `adopt`.")
    for group in parts.on_host:
        for member in group:
            member.tensor.data = member.tensor.data.cpu()
    for name in set(before) - {block.name for block in parts.blocks}:
        del before[name]  # blocks instead of their parts, or the other way: slabs go with their last tensor
    memory = HostMemory(device)
    _place_resident(parts.rest, device, progress)
    blocks = zip(parts.blocks, placement.resident, placement.streamed, strict=True)
    with ThreadPoolExecutor(WORKERS if device.type == "cuda" else 1) as pool:
        jobs: list[Future[Any]] = []
        for block, resident, streamed in blocks:
            leaves = _on_device(streamed, device)
            old = before.pop(block.name, None)
            if old is not None and _can_stay(old, streamed, placement):
                jobs.append(pool.submit(_keep, old, progress))
            elif placement.plan.source == "mapped" or (may_wait and old is not None and old.slab is None):
                jobs.append(pool.submit(_leave, block.name, streamed))
            else:
                jobs.append(pool.submit(_place_streamed, block.name, streamed, memory, progress))
            if leaves:  # old slabs go before new ones come
                jobs[-1].result()
            if leaves or _on_device((*block.small, *resident), device):
                torch.cuda.empty_cache()  # else smaller slabs would lie in larger ones, which stay then
            # In two slabs: small tensors outlive the others when layers are replaced.
            _place_resident(block.small, device, progress)
            _place_resident(resident, device, progress)
        units = [job.result() for job in jobs]
    return [unit for unit in units if unit is not None]


def _on_device(groups: Sequence[Group], device: torch.device) -> bool:
    on_device = any(member.tensor.device == device for group in groups for member in group)
    return on_device and device.type == "cuda"


def _keep(unit: Unit, progress: Progress) -> Unit:
    progress.add(unit.layout.num_bytes)
    return unit


def _can_stay(unit: Unit, groups: Sequence[Group], placement: Placement) -> bool:
    layout, members = layout_for(groups)
    is_pinned = unit.slab is not None
    at_home = all(
        m.tensor.data_ptr() == home.data_ptr() for m, home in zip(members, unit.homes, strict=False)
    )
    same = (unit.members, unit.layout) == (members, layout)
    return same and at_home and is_pinned == (placement.plan.source == "pinned")


def bring_home(placement: Placement) -> None:
    """All weights to the CPU, after something went wrong."""
    for group in all_groups(placement):
        for member in group:
            if not member.tensor.is_meta:
                member.tensor.data = member.tensor.data.cpu()


def all_groups(placement: Placement) -> Iterator[Group]:
    """Everything in the module."""
    parts = placement.survey
    yield from (*parts.rest, *parts.on_host)
    for block in parts.blocks:
        yield from (*block.small, *block.large)


def layout_for(groups: Sequence[Group]) -> tuple[Layout, tuple[Member, ...]]:
    """The layout of a slab of these groups, and its tensors in order."""
    layout = layout_of([[member.spec for member in group] for group in groups])
    return layout, tuple(member for group in groups for member in group)


def is_plain(member: Member) -> bool:
    """Whether it is an ordinary tensor; those of other libraries look after themselves."""
    return type(member.tensor) in (Tensor, nn.Parameter)


def _place_resident(groups: Sequence[Group], device: torch.device, progress: Progress) -> None:
    for group in groups:
        for member in group:
            if not is_plain(member):
                member.owner.to(device)
    plain = [tuple(filter(is_plain, group)) for group in groups]
    layout, members = layout_for(plain)
    views = layout.views(device_slab(layout.num_bytes, device))
    for member, view in zip(members, views, strict=True):
        view.copy_(member.tensor.detach())
        member.tensor.data = view
    progress.add(layout.num_bytes)


@torch.no_grad()
def _place_streamed(
    name: str, groups: Sequence[Group], memory: HostMemory, progress: Progress
) -> Unit | None:
    layout, members = layout_for(groups)
    if not members:
        return None
    slab = memory.slab(layout.num_bytes)
    from_device = any(member.tensor.is_cuda for member in members)
    if from_device:  # to pages that are pinned it copies several times as fast
        slab = memory.pin(slab)
    for member, view in zip(members, layout.views(slab.tensor), strict=True):
        view.copy_(member.tensor.detach())
    unit = unit_of(name, members, layout, slab if from_device else memory.pin(slab))
    for member, home in zip(members, unit.homes, strict=True):
        member.tensor.data = home
    progress.add(layout.num_bytes)
    return unit


def unit_of(name: str, members: tuple[Member, ...], layout: Layout, slab: HostSlab) -> Unit:
    """A unit whose homes are in one slab."""
    homes = layout.views(slab.tensor)
    return Unit(name=name, members=members, layout=layout, homes=homes, slab=slab)


@torch.no_grad()
def _leave(name: str, groups: Sequence[Group]) -> Unit | None:
    """A unit of weights that stay where they are on the host."""
    layout, members = layout_for(groups)
    if not members:
        return None
    homes = [member.tensor.detach().cpu() for member in members]
    for member, home in zip(members, homes, strict=True):
        member.tensor.data = home
    return Unit(name=name, members=members, layout=layout, homes=homes, slab=None)
