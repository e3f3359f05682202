"""The state of a module that streams: slabs, slots, hooks; how it is made and undone."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import (
    BLOCK_HOOK,
    CALL_HOOK,
    GATHER_HOOK,
    BlockHook,
    CallHook,
    GatherHook,
    add_innermost,
    remove,
)
from .lanes import Lane, lane_to
from .layout import layout_of
from .mapped import MappedFeeder
from .memory import HostMemory, HostSlab, device_slab
from .plan import Placement
from .ring import Feeder, Ring, Slot, Unit
from .survey import Group, Member, members_of
from .visits import Visits, release_adapters

logger = logging.getLogger(__name__)

STATE = "_diffusers_qwenimage_stream"
WORKERS = 4  # blocks that are copied to pinned memory at a time


class Streaming:
    """One module that streams.

    Args:
        module: the module.
        placement: what stays and what streams.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, placement: Placement, device: torch.device) -> None:
        self.placement = placement
        self.device = device
        self._module = module
        self._units: list[Unit] = []
        self._slots: list[Slot] = []
        self._ring: Ring | None = None
        self._visits: Visits | None = None
        self._feeder: Feeder | None = None
        self._lane: Lane = lane_to(device)
        self._hooked: list[tuple[nn.Module, str]] = []
        self._frozen: list[nn.Parameter] = []

    @property
    def fetched_bytes(self) -> int:
        """Bytes copied to the device for visits."""
        return 0 if self._ring is None else self._ring.fetched_bytes

    def settle(self) -> None:
        """Let every tensor be at home."""
        if self._visits is not None:
            self._visits.settle()

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Place the weights and register the hooks; if that fails, the module is whole, on the CPU."""
        started = False
        try:
            self._reserve_slots()
            with torch.no_grad():
                self._place(Progress(progress, self._total_bytes()))
            self._connect()
            started = True
        finally:
            if not started:
                self.stop()
                self._bring_home()
        setattr(self._module, STATE, self)

    def stop(self) -> None:
        """Remove the hooks and give slots and pinned pages back; weights stay where they are."""
        self.settle()
        if self._feeder is not None:
            self._feeder.stop()
        self._lane.drain()
        for module, name in self._hooked:
            remove(module, name)
        self._hooked.clear()
        release_adapters(self._module)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        for unit in self._units:
            if unit.slab is not None:
                unit.slab.unpin()
        self._units, self._slots, self._ring, self._visits, self._feeder = [], [], None, None, None
        self._module.__dict__.pop("_apply", None)
        self._module.__dict__.pop(STATE, None)
        _hooks_changed(self._module)

    # --- placing ---

    def _reserve_slots(self) -> None:
        """First of all: what streams needs room on the device in any case."""
        sizes = [plan.streamed_bytes for plan in self.placement.plan.blocks]
        for _ in range(self.placement.plan.num_slots):
            memory = device_slab(max(sizes), self.device)
            self._slots.append(Slot(memory=memory, ready=self._lane.mark(), free=self._lane.mark()))

    def _total_bytes(self) -> int:
        plan = self.placement.plan
        return plan.resident_bytes + plan.streamed_bytes

    def _place(self, progress: "Progress") -> None:
        parts = self.placement.survey
        meta = next((m for g in self._all_groups() for m in g if m.tensor.is_meta), None)
        if meta is not None:
            raise ValueError(
                f"{meta.key} is on the meta device: it has no values. Load the weights with `adopt`."
            )
        for group in parts.on_host:
            for member in group:
                member.tensor.data = member.tensor.data.cpu()
        memory = HostMemory(self.device)
        self._place_resident(parts.rest, progress)
        blocks = zip(parts.blocks, self.placement.resident, self.placement.streamed, strict=True)
        with ThreadPoolExecutor(WORKERS if self.device.type == "cuda" else 1) as pool:
            jobs = []
            for block, resident, streamed in blocks:
                # A worker has its own streams: what it copies is complete when its future is.
                jobs.append(pool.submit(self._place_streamed, block.name, streamed, memory, progress))
                self._place_resident((*block.small, *resident), progress)
            units = [job.result() for job in jobs]
        self._units = [unit for unit in units if unit is not None]

    def _all_groups(self) -> Iterator[Group]:
        parts = self.placement.survey
        yield from (*parts.rest, *parts.on_host)
        for block in parts.blocks:
            yield from (*block.small, *block.large)

    def _place_resident(self, groups: Sequence[Group], progress: "Progress") -> None:
        members = [member for group in groups for member in group]
        plain = [member for member in members if type(member.tensor) in (Tensor, nn.Parameter)]
        for member in members:
            if member not in plain:  # tensors of other libraries look after themselves
                member.owner.to(self.device)
        layout = layout_of([[m.spec for m in group if m in plain] for group in groups])
        views = layout.views(device_slab(layout.num_bytes, self.device))
        for member, view in zip(plain, views, strict=True):
            view.copy_(member.tensor.detach())
            member.tensor.data = view
        progress.add(layout.num_bytes)

    def _place_streamed(
        self, name: str, groups: Sequence[Group], memory: HostMemory, progress: "Progress"
    ) -> Unit | None:
        members = tuple(member for group in groups for member in group)
        if not members:
            return None
        layout = layout_of([[member.spec for member in group] for group in groups])
        slab: HostSlab | None = None
        if self.placement.plan.source == "pinned":
            slab = memory.slab(layout.num_bytes)
            for member, view in zip(members, layout.views(slab.tensor), strict=True):
                view.copy_(member.tensor.detach())
            slab = memory.pin(slab)
            homes = layout.views(slab.tensor)
        else:
            homes = [member.tensor.detach().cpu() for member in members]
        for member, home in zip(members, homes, strict=True):
            member.tensor.data = home
        progress.add(layout.num_bytes)
        return Unit(name=name, members=members, layout=layout, homes=homes, slab=slab)

    def _bring_home(self) -> None:
        for group in self._all_groups():
            for member in group:
                if not member.tensor.is_meta:
                    member.tensor.data = member.tensor.data.cpu()

    # --- hooks ---

    def _connect(self) -> None:
        parts = self.placement.survey
        modules = {block.name: block.module for block in parts.blocks}
        indices = {unit.name: index for index, unit in enumerate(self._units)}
        if self._units:
            lists = []
            for blocks in parts.lists.values():
                inside = [indices[block.name] for block in blocks if block.name in indices]
                if inside:
                    lists.append(range(inside[0], inside[-1] + 1))
            self._feeder = self._make_feeder()
            self._ring = Ring(self._units, lists, self._slots, feeder=self._feeder, lane=self._lane)
            self._visits = Visits(
                self._units,
                [modules[unit.name] for unit in self._units],
                self._ring,
                self.device,
                list(parts.on_call.values()),
            )
        for index, unit in enumerate(self._units):
            assert self._visits is not None
            enter = _Enter(self._visits, index)
            self._hook(modules[unit.name], BlockHook(enter, self._visits.leave), BLOCK_HOOK)
            self._freeze(unit.members)
        for module in parts.on_call.values():
            self._hook(module, CallHook(self.device), CALL_HOOK)
        for module in parts.gathered.values():
            self._hook(module, GatherHook(self.device), GATHER_HOOK)
        self._bring_adapters()
        _hooks_changed(self._module)
        self._module.__dict__["_apply"] = _Guard(self._module, self.device)

    def _make_feeder(self) -> Feeder:
        if self.placement.plan.source == "pinned":
            return Feeder(self._lane)
        return MappedFeeder(self._lane, self._units, self.device)

    def _hook(self, module: nn.Module, hook: Any, name: str) -> None:
        add_innermost(module, hook, name)
        self._hooked.append((module, name))

    def _freeze(self, members: Sequence[Member]) -> None:
        for member in members:
            tensor = member.tensor
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                tensor.requires_grad_(False)
                self._frozen.append(tensor)

    def _bring_adapters(self) -> None:
        """Adapters that are there already go to the device, but for those of modules that come on call."""
        aside = set(map(id, self.placement.survey.on_call.values()))
        aside |= set(map(id, self.placement.survey.gathered.values()))
        known = {id(member.tensor) for member in members_of(self._module, "")}

        def bring(module: nn.Module) -> None:
            if id(module) in aside:
                return
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in known:
                    tensor.data = tensor.data.to(self.device)
            for child in module._modules.values():
                if child is not None:
                    bring(child)

        with torch.no_grad():
            bring(self._module)


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


class _Enter:
    def __init__(self, visits: Visits, index: int) -> None:
        self._visits = visits
        self._index = index

    def __call__(self) -> None:
        self._visits.enter(self._index)


class _Guard:
    """Stands in for `_apply`, through which `.to`, `.cuda`, `.cpu`, `.half` and their like reach a module."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Nothing, if the module is asked to be where it computes already.

        Raises:
            ValueError: if it is asked to be somewhere else, or of another type.
        """
        name = type(self._module).__name__
        dtype = next((p.dtype for p in self._module.parameters() if p.is_floating_point()), torch.float32)
        probe = fn(torch.empty(0, dtype=dtype))
        if probe.dtype != dtype:
            raise ValueError(
                f"{name} streams its weights as {dtype}; they cannot be cast to {probe.dtype} meanwhile. "
                "Call unstream(module), cast, and stream again."
            )
        if probe.device.type != self._device.type or probe.device.index not in (None, self._device.index):
            raise ValueError(
                f"{name} streams its weights to {self._device} and cannot be moved to {probe.device}: host "
                "memory holds only what streams. Call unstream(module) first, which puts it on the CPU. (CPU "
                "offload moves whole modules; streaming replaces it.)"
            )
        logger.info("%s streams its weights to %s already; it stays as it is.", name, self._device)
        return self._module


def state_of(module: nn.Module) -> Streaming | None:
    """The state of a module that streams."""
    state: Streaming | None = module.__dict__.get(STATE)
    return state


def _hooks_changed(module: nn.Module) -> None:
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
