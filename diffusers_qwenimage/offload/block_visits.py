"""What happens around the forward of a streamed block: weights in, weights out.

Outside of its visit every streamed tensor is its home in host memory, so that `state_dict`, saving and
merging a LoRA see the true weights. During a visit its `data` is a view of a slot on the device. Nothing is
copied back.

With gradients a block keeps its slot until the next visit, since the backward pass of a block reads its
weights after its forward has returned. That is enough with gradient checkpointing, which runs a block's
forward again right before its backward. Without it a backward would read a slot that holds another block by
then: versions are counted up, so that autograd notices.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .pinning import LatePinning
from .ring import Ring, Slot, Unit

if TYPE_CHECKING:
    from .packed import Workspace

NO_COPY = "A module that streams its weights cannot be copied. Call unstream(module) first."


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A block that has its weights on the device.

    Attributes:
        index: of the unit.
        slot: where the weights are; None: in the workspace.
        tensors: the module's tensors.
        views: their data, on the device.
        with_gradient: whether a graph may be recorded.
    """

    index: int
    slot: Slot | None
    tensors: Sequence[Tensor]
    views: Sequence[Tensor]
    with_gradient: bool


class Visits:
    """Visits to the streamed blocks of one module, one at a time.

    Args:
        units: the streamed blocks.
        modules: the blocks themselves, in the same order.
        ring: brings their weights.
        device: where they compute.
        aside: modules within blocks that fetch their weights themselves.
        is_split: whether these are parts of blocks: a backward pass would need all of a block's at once.
        pinning: of the units, if some are still to be pinned.

    Attributes:
        workspace: where packed weights are unpacked.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        modules: Sequence[nn.Module],
        ring: Ring,
        device: torch.device,
        aside: Sequence[nn.Module],
        *,
        is_split: bool = False,
        pinning: LatePinning | None = None,
    ) -> None:
        self._units = units
        self._modules = modules
        self._ring = ring
        self._device = device
        self._aside = frozenset(map(id, aside))
        self._is_split = is_split
        self.workspace: Workspace | None = None
        self._pinning = pinning
        self._busy = threading.Lock()
        self._open: Visit | None = None
        self._kept: Visit | None = None

    def __reduce_ex__(self, protocol: object) -> Any:
        """Copies and pickles would hold the same slots.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_COPY)

    @torch.compiler.disable
    def enter(self, index: int) -> None:
        """Give a block its weights.

        Raises:
            RuntimeError: if another block is being visited: two threads run the module at once.
            ValueError: if a weight was replaced by one of another shape or type, or asks for a gradient; with
                gradients where blocks are split.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                f"{self._units[index].name} was called while another block of this module runs. A module "
                "that streams its weights can be used by one thread at a time; give every thread its own."
            )
        try:
            self.settle()
            if self._pinning is not None:
                self._pinning.visit(index)
            self._begin(index, torch.is_grad_enabled())
        except BaseException:
            self._abandon()
            self._busy.release()
            raise

    @torch.compiler.disable
    def leave(self) -> None:
        """Take the weights of the block away, or keep them there for its backward pass."""
        visit, self._open = self._open, None
        try:
            if visit is not None and visit.with_gradient:
                self._kept = visit
            elif visit is not None:
                self._end(visit, ahead=True)
        finally:
            self._busy.release()

    def settle(self) -> None:
        """Take away what was kept for a backward pass: all tensors are at home afterwards."""
        visit, self._kept = self._kept, None
        if visit is not None:
            self._end(visit, ahead=False)
            # A graph without checkpoints may still refer to the slot; it has to notice.
            torch.autograd.graph.increment_version(visit.tensors)

    def finish_pinning(self) -> None:
        """Wait until all units are pinned, if they are to be.

        Raises:
            RuntimeError: during a visit.
        """
        if self._pinning is None:
            return
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("Wait for pinned memory between calls of the module, not during one.")
        try:
            self.settle()
            self._pinning.finish()
        finally:
            self._busy.release()

    def close(self) -> None:
        """Let go of all memory: hooks that were removed may live until Python collects cycles."""
        self.settle()
        self._units, self._modules, self.workspace, self._pinning = (), (), None, None
        self._ring.close()

    @contextmanager
    def at_home(self, index: int) -> Iterator[None]:
        """The tensors of a unit at home, to be changed there; copies on the device follow."""
        visit = next((v for v in (self._open, self._kept) if v is not None and v.index == index), None)
        unit = self._units[index]
        if self._pinning is not None:
            self._pinning.will_change(index)
        if visit is None:
            try:
                yield
            finally:
                self._forget(index)
            return
        _set(visit.tensors, unit.homes)
        try:
            yield
        finally:
            if visit.slot is None:
                self._forget(index)
            for view, home in zip(visit.views, unit.homes, strict=True):
                view.copy_(home)
            _set(visit.tensors, visit.views)

    def _begin(self, index: int, with_gradient: bool) -> None:
        unit = self._units[index]
        tensors = [member.tensor for member in unit.members]
        if with_gradient and self._is_split:
            raise ValueError(
                f"{unit.name} is a part of a block that streams by itself, which works without gradients "
                "only: use the module under torch.no_grad(), or call stream(..., split=False), which needs "
                "memory for a whole block."
            )
        if with_gradient and any(tensor.requires_grad for tensor in tensors):
            raise ValueError(
                f"Weights of {unit.name} ask for gradients, but they stream and cannot be trained: they are "
                "never copied back. Call requires_grad_(False) on them, or unstream(module)."
            )
        self._take_in_replaced(index, tensors)
        slot, views = self._arrive(index, with_gradient)
        self._open = Visit(index=index, slot=slot, tensors=tensors, views=views, with_gradient=with_gradient)
        _set(tensors, views)
        self.bring_adapters(self._modules[index], index)

    def _arrive(self, index: int, with_gradient: bool) -> tuple[Slot | None, Sequence[Tensor]]:
        """The weights of a unit on the device, and the slot that holds them if it is taken for the visit."""
        unit, workspace = self._units[index], self.workspace
        if unit.packed is not None and not unit.is_as_packed():
            self._forget(index)
        if unit.packed is None or workspace is None:
            slot = self._ring.borrow(index, with_gradient=with_gradient)
            try:
                return slot, slot.views(unit.layout)
            except BaseException:
                self._ring.give_back(slot, ahead=False)
                raise
        if workspace.holds == index:
            self._ring.pass_by(index, with_gradient=with_gradient)
            return None, workspace.views(unit.layout)
        slot = self._ring.borrow(index, with_gradient=with_gradient)
        try:
            workspace.unpack(index, unit, slot.memory)
        finally:
            self._ring.give_back(slot, ahead=True, with_gradient=with_gradient)
        return None, workspace.views(unit.layout)

    def _forget(self, index: int) -> None:
        self._ring.forget(index)
        if self.workspace is not None and self.workspace.holds == index:
            self.workspace.holds = None

    def _end(self, visit: Visit, *, ahead: bool) -> None:
        try:
            _set(visit.tensors, self._units[visit.index].homes)
        finally:
            if visit.slot is not None:
                self._ring.give_back(visit.slot, ahead=ahead)

    def _abandon(self) -> None:
        visit, self._open = self._open, None
        if visit is not None:
            self._end(visit, ahead=False)

    @torch.no_grad()
    def _take_in_replaced(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Weights that somebody put in the place of ours (`load_state_dict(assign=True)`, `p.data = ...`)."""
        unit = self._units[index]
        for tensor, home, member in zip(tensors, unit.homes, unit.members, strict=True):
            if tensor.data_ptr() == home.data_ptr() and tensor.device == home.device:
                continue
            if tensor.shape != home.shape or tensor.dtype != home.dtype:
                raise ValueError(
                    f"{member.key} is now {tensor.dtype} {tuple(tensor.shape)}, but was streamed as "
                    f"{home.dtype} {tuple(home.shape)}. Call unstream(module) before changing layers, and "
                    "stream again."
                )
            home.copy_(tensor.detach())
            tensor.requires_grad_(False)
            tensor.data = home
            self._forget(index)

    @torch.no_grad()
    def bring_adapters(self, module: nn.Module, index: int | None) -> None:
        """Move adapters to the device, where they stay, and let them be merged at the weights' home."""
        if id(module) in self._aside:
            return
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.device != self._device:
                with torch.inference_mode(False):
                    tensor.data = tensor.data.to(self._device)
        if index is not None and "base_layer" in module._modules and "merge" not in module.__dict__:
            for name in ("merge", "unmerge"):
                if hasattr(module, name):
                    module.__dict__[name] = _MergeAtHome(self, module, name, index)
        for child in module._modules.values():
            if child is not None:
                self.bring_adapters(child, index)


class _MergeAtHome:
    """`merge` or `unmerge` of an adapter layer whose base weight has its home in host memory."""

    def __init__(self, visits: Visits, layer: nn.Module, name: str, index: int) -> None:
        self._visits = visits
        self._layer = layer
        self._name = name
        self._index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original: Callable[..., Any] = getattr(type(self._layer), self._name)
        with self._visits.at_home(self._index):
            home = next(self._layer.get_submodule("base_layer").parameters()).device
            moved = [(t, t.data) for t in self._adapter_tensors() if t.device != home]
            try:
                for tensor, data in moved:
                    tensor.data = data.to(home)
                return original(self._layer, *args, **kwargs)
            finally:
                for tensor, data in moved:
                    tensor.data = data

    def _adapter_tensors(self) -> Iterator[Tensor]:
        for name, child in self._layer.named_children():
            if name != "base_layer":
                yield from child.parameters()
                yield from child.buffers()


def release_adapters(module: nn.Module) -> None:
    """Undo what `bring_adapters` did to the layers' methods."""
    for part in module.modules():
        for name in ("merge", "unmerge"):
            if isinstance(part.__dict__.get(name), _MergeAtHome):
                del part.__dict__[name]


def _set(tensors: Sequence[Tensor], data: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, data, strict=True):
        tensor.data = value
