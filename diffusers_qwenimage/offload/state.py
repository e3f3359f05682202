"""The state of a module that streams: slabs, slots, hooks; how it is made and undone."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusers_qwenimage.module_hooks import STREAM_HOOK

from .block_visits import NO_COPY, Visits, release_adapters
from .copy_lane import Lane, lane_to
from .hooks import (
    CALL_HOOK,
    GATHER_HOOK,
    CallHook,
    GatherHook,
    StreamHook,
    add_innermost,
    refuse_accelerate,
    remove,
)
from .mapped import MappedFeeder
from .memory import HostMemory, device_slab
from .pinning import LatePinning, Pinner
from .placing import Progress, bring_home
from .plan import Placement
from .ring import Feeder, Ring, Slot, Unit
from .survey import Member, members_of

if TYPE_CHECKING:
    from .packed import Workspace

logger = logging.getLogger(__name__)

STATE = "_diffusers_qwenimage_stream"
Place = Callable[[Placement, torch.device, Progress], list[Unit]]


class Streaming:
    """One module that streams.

    Args:
        module: the module.
        placement: what stays and what streams.
        device: where it computes.
        pinner: pins what was left in mapped files though it is to be pinned.
    """

    def __init__(
        self,
        module: nn.Module,
        placement: Placement,
        device: torch.device,
        pinner: Pinner | None = None,
    ) -> None:
        self.placement = placement
        self.device = device
        self._pinner = pinner
        self._pinning: LatePinning | None = None
        self._module = module
        self._units: list[Unit] = []
        self._slots: list[Slot] = []
        self._ring: Ring | None = None
        self._visits: Visits | None = None
        self._feeder: Feeder | None = None
        self._lane: Lane = lane_to(device)
        self.recorded_with = 0  # `num_changed` when a graph was recorded
        self._hooked: list[tuple[nn.Module, str]] = []
        self._frozen: list[nn.Parameter] = []

    @property
    def units(self) -> list[Unit]:
        """What streams."""
        return self._units

    @property
    def slots(self) -> list[Slot]:
        """Places on the device for blocks."""
        return self._slots

    @property
    def lane(self) -> Lane:
        """What copies to the device."""
        return self._lane

    @property
    def fetched_bytes(self) -> int:
        """Bytes copied to the device for visits."""
        return 0 if self._ring is None else self._ring.fetched_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is pinned now."""
        units = sum(unit.slab.tensor.numel() for unit in self._units if unit.slab is not None)
        return units + self._ready_bytes + (0 if self._feeder is None else self._feeder.pinned_bytes)

    @property
    def unpinned_bytes(self) -> int:
        """Of what streams from pinned memory by plan, bytes that are not there yet."""
        if self.placement.plan.source != "pinned":
            return 0
        return sum(unit.layout.num_bytes for unit in self._units if unit.slab is None) - self._ready_bytes

    @property
    def _ready_bytes(self) -> int:
        return 0 if self._pinning is None else self._pinning.ready_bytes

    def __reduce_ex__(self, protocol: object) -> Any:
        """Copies and pickles would hold the same slots.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_COPY)

    @property
    def num_changed(self) -> int:
        """Blocks that are not copied packed any more, since their weights have changed."""
        return 0 if self._ring is None else self._ring.num_changed

    def give_up_slot(self) -> Tensor:
        """The memory of a slot that is none from now on."""
        self.rest()
        self._slots.pop()  # the ring has the same list
        return device_slab(max(unit.layout.num_bytes for unit in self._units), self.device)

    def use_workspace(self, workspace: "Workspace") -> None:
        """Unpack what is copied packed there."""
        assert self._visits is not None
        self._visits.workspace = workspace

    def forget(self) -> None:
        """No slot holds anything, and no mark was reached."""
        for slot in self._slots:
            slot.holds, slot.sample = None, None
            slot.ready, slot.free = self._lane.mark(), self._lane.mark()
        if self._visits is not None and self._visits.workspace is not None:
            self._visits.workspace.holds = None

    def settle(self) -> None:
        """Let every tensor be at home."""
        if self._visits is not None:
            self._visits.settle()

    def rest(self) -> None:
        """Give the memory of the slots back until the next visit."""
        self.settle()
        if self._pinning is not None:
            self._pinning.rest()
        if self._ring is not None:
            self._ring.rest()
        if self._visits is not None and self._visits.workspace is not None:
            self._visits.workspace.rest()

    def finish_pinning(self) -> None:
        """Wait until everything that is to be pinned is, and let the tensors be there.

        Raises:
            RuntimeError: during a visit to a block.
        """
        if self._visits is not None:
            self._visits.finish_pinning()

    def start(self, place: Place, progress: Callable[[int, int], None] | None = None) -> None:
        """Place the weights and register the hooks; if that fails, the module is whole, on the CPU.

        Args:
            place: puts the weights where they will live, and returns what streams.
            progress: called with (bytes done, bytes in all).
        """
        plan, started = self.placement.plan, False
        try:
            refuse_accelerate(self._module)
            self._reserve_slots()
            total = plan.resident_bytes + plan.streamed_bytes
            with torch.no_grad():
                self._units = place(self.placement, self.device, Progress(progress, total))
            self._connect()
            started = True
        finally:
            if not started:
                self.stop()
                bring_home(self.placement)
        setattr(self._module, STATE, self)

    def stop(self) -> None:
        """Remove the hooks and give slots and pinned pages back; weights stay where they are."""
        for unit in self.disconnect().values():
            if unit.slab is not None:
                unit.slab.unpin()

    def disconnect(self) -> dict[str, Unit]:
        """Remove the hooks and give the slots back; what streamed, still pinned, by the name of the block."""
        self.settle()
        if self._pinning is not None:
            self._pinning.stop()
        if self._feeder is not None:
            self._feeder.stop()
        self._lane.drain()
        for module, name in self._hooked:
            remove(module, name)
        self._hooked.clear()
        if self._visits is not None:
            self._visits.close()
        release_adapters(self._module)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        for unit in self._units:
            unit.drop_packed()
        units = {unit.name: unit for unit in self._units}
        self._units, self._slots, self._ring, self._visits, self._feeder = [], [], None, None, None
        self._pinning = None
        self._module.__dict__.pop("_apply", None)
        self._module.__dict__.pop(STATE, None)
        _hooks_changed(self._module)
        return units

    def _reserve_slots(self) -> None:
        """First of all: what streams needs room on the device in any case."""
        sizes = [plan.streamed_bytes for plan in self.placement.plan.blocks]
        for _ in range(self.placement.plan.num_slots):
            memory = device_slab(max(sizes), self.device)
            slot = Slot(memory=memory, ready=self._lane.mark(), free=self._lane.mark())
            self._lane.reach(slot.free)  # what had this memory before is done with it by then
            self._slots.append(slot)

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
            if self.placement.plan.source == "pinned" and any(unit.slab is None for unit in self._units):
                assert self._pinner is not None
                memory = HostMemory(self.device)
                stop = self._feeder.stop
                self._pinning = LatePinning(self._units, memory, self._pinner, when_done=stop)
            self._ring = Ring(self._units, lists, self._slots, feeder=self._feeder, lane=self._lane)
            self._visits = Visits(
                self._units,
                [modules[unit.name] for unit in self._units],
                self._ring,
                self.device,
                list(parts.on_call.values()),
                is_split=parts.is_split,
                pinning=self._pinning,
            )
        for index, unit in enumerate(self._units):
            assert self._visits is not None
            enter = _Enter(self._visits, index)
            self._hook(modules[unit.name], StreamHook(enter, self._visits.leave), STREAM_HOOK)
            self._freeze(unit.members)
        for module in parts.on_call.values():
            self._hook(module, CallHook(self.device), CALL_HOOK)
        for module in parts.gathered.values():
            self._hook(module, GatherHook(self.device), GATHER_HOOK)
        self._bring_adapters()
        _hooks_changed(self._module)
        self._module.__dict__["_apply"] = _Guard(self._module, self.device)

    def _make_feeder(self) -> Feeder:
        mapped = [unit for unit in self._units if unit.slab is None]
        return MappedFeeder(self._lane, mapped, self.device) if mapped else Feeder(self._lane)

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
        with torch.no_grad():
            _bring(self._module, aside, known, self.device)


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


def _bring(module: nn.Module, aside: set[int], known: set[int], device: torch.device) -> None:
    """Tensors of a module that are not `known` to a device, but for modules `aside`; both by their ids.

    No function inside of a method: that would refer to itself, and keep all weights that its state names
    until Python collects cycles.
    """
    if id(module) in aside:
        return
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and id(tensor) not in known:
            tensor.data = tensor.data.to(device)
    for child in module._modules.values():
        if child is not None:
            _bring(child, aside, known, device)
