"""Weights from files straight to where they will live, each once.

    transformer = empty_module(lambda: QwenImageTransformer2DModel.from_config(config)).to(torch.bfloat16)
    quantize_(transformer, "fp8")                       # if wanted: on the meta device it costs nothing
    adopt(transformer, checkpoint, device="cuda", vram_limit=12 * 2**30)

The module is on the meta device. Several threads read: what streams goes from the file into the pinned slab
of its block, what stays goes to the device through a small pinned buffer, and weights of quantised layers are
quantised on the device on their way. What is only used on call stays in the mapped file, as does what streams
with `source="mapped"`.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusers_qwenimage.checkpoint import Checkpoint
from diffusers_qwenimage.checkpoint.assign import check_fits, tied_names
from diffusers_qwenimage.checkpoint.reader import DTYPES, StoredTensor
from diffusers_qwenimage.checkpoint.scaled import ScaledCheckpoint, apply_scale, split_scales
from diffusers_qwenimage.quantize import QuantizedLinear
from diffusers_qwenimage.quantize.stored import stored_weight

from .layout import Layout
from .memory import HostMemory, HostSlab, device_slab
from .placing import Progress, layout_for, unit_of
from .plan import Placement, Source, StreamPlan, Surveys, make_plan
from .ring import Unit
from .state import Streaming
from .stream import device_of
from .survey import Group, Member

READERS = 8
CONVERSIONS = (
    2  # weights that are quantised or scaled at a time: each takes a few times its size on the device
)
BUFFER_BYTES = 32 * 2**20  # pinned, per reader, for what stays on the device


def adopt(
    module: nn.Module,
    weights: Checkpoint,
    *,
    device: str | torch.device,
    vram_limit: int | None = None,
    blocks: Sequence[str] | None = None,
    on_call: Sequence[str] | None = None,
    source: Source = "pinned",
    num_slots: int | None = None,
    split: bool | None = None,
    surveys: Surveys | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StreamPlan:
    """Load a module that is on the meta device, and stream it.

    Floating-point weights are cast to the types that the module has. Buffers that are in no checkpoint must
    be real (as `empty_module` leaves them).

    Args:
        module: on meta, of the types it shall have; its quantised layers (`quantize_`) get their weights
            quantised.
        weights: the tensors under the module's names (`read_component`).
        device: as in `stream`, like the other arguments.
        surveys: as in `plan_stream`.
        progress: called with (bytes done, bytes in all).

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, or the file is quantised in an
            unknown way; if the budget is too small; if weights that should stay in the mapped file would have
            to be converted. Nothing is read then.
        MemoryError, torch.OutOfMemoryError: if there is not enough memory; the module is on meta as before.
    """
    scaled = split_scales(weights)
    check_fits(module, scaled.weights, optional=_made_here(module))
    _tie(module)
    target = device_of(device)
    placement = make_plan(
        module,
        vram_limit,
        device=str(target),
        blocks=blocks,
        on_call=on_call,
        source=source,
        num_slots=num_slots,
        split=split,
        surveys=surveys,
    )
    if source == "mapped":
        _check_unchanged(module, placement, scaled)

    def place(placement: Placement, device: torch.device, progress: Progress) -> list[Unit]:
        return _Adoption(module, placement, device, progress).run(scaled)

    Streaming(module, placement, target).start(place, progress)
    return placement.plan


@dataclass(kw_only=True)
class _Slab:
    """A piece of memory that fills up.

    Attributes:
        name: of the block, if it streams.
        members: what goes there, in order.
        layout: where.
        memory: flat uint8.
        host: the same, if it is host memory.
        missing: keys that are not there yet.
    """

    name: str
    members: tuple[Member, ...]
    layout: Layout
    memory: Tensor
    host: HostSlab | None = None
    missing: set[str] = field(default_factory=set)


class _Adoption:
    """One module's weights on their way.

    Args:
        module: on the meta device.
        placement: where everything goes.
        device: where resident weights go.
        progress: is told.
    """

    def __init__(
        self, module: nn.Module, placement: Placement, device: torch.device, progress: Progress
    ) -> None:
        self._module = module
        self._placement = placement
        self._device = device
        self._progress = progress
        self._memory = HostMemory(device)
        self._slabs: list[_Slab] = []
        self._place_of: dict[str, tuple[_Slab, Tensor]] = {}
        self._left: dict[str, Tensor] = {}  # what stays as it is on the host, by name
        self._stays: dict[str, Member] = {}
        self._rotations: Mapping[str, int] = {}  # of weights whose columns are rotated in the file
        self._streams: set[str] = set()  # of what stays, the part that the plan counts
        self._lock = threading.Lock()
        self._conversions = threading.Semaphore(CONVERSIONS)
        self._local = threading.local()

    def run(self, scaled: ScaledCheckpoint) -> list[Unit]:
        """Read everything, and give the module its tensors."""
        self._prepare()
        self._rotations = scaled.rotations
        factors = dict(Checkpoint(tensors=scaled.scales, metadata={}).read())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # who had the slabs' memory before is done with it
        in_order = sorted(scaled.weights.tensors.items(), key=lambda item: (item[1].file, item[1].offset))
        with ThreadPoolExecutor(READERS if self._device.type == "cuda" else 1) as pool:
            jobs = [
                pool.submit(self._take, name, stored, scaled.weights, factors.get(name))
                for name, stored in in_order
            ]
            self._wait_for(jobs)
        return self._give()

    @staticmethod
    def _wait_for(jobs: Sequence[Future[None]]) -> None:
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()  # those that have not begun, after one has failed

    def _prepare(self) -> None:
        parts = self._placement.survey
        mapped = self._placement.plan.source == "mapped"
        self._add_slab("", parts.rest, resident=True)
        rows = zip(parts.blocks, self._placement.resident, self._placement.streamed, strict=True)
        for block, resident, streamed in rows:
            self._add_slab(block.name, block.small, resident=True)
            self._add_slab(block.name, resident, resident=True)
            if mapped:
                self._stays.update({m.key: m for group in streamed for m in group})
                self._streams.update(self._stays)
            elif streamed:
                self._add_slab(block.name, streamed, resident=False)
        self._stays.update({m.key: m for group in parts.on_host for m in group})

    def _add_slab(self, name: str, groups: Sequence[Group], *, resident: bool) -> None:
        layout, members = layout_for(groups)
        if resident:
            slab = _Slab(
                name=name, members=members, layout=layout, memory=device_slab(layout.num_bytes, self._device)
            )
        else:
            host = self._memory.slab(layout.num_bytes)
            slab = _Slab(name=name, members=members, layout=layout, memory=host.tensor, host=host)
        self._slabs.append(slab)
        for member, view in zip(members, layout.views(slab.memory), strict=True):
            if not member.tensor.is_meta:  # a buffer that no file holds
                view.copy_(member.tensor)
                continue
            slab.missing.add(member.key)
            self._place_of[member.key] = slab, view

    @torch.no_grad()
    def _take(self, name: str, stored: StoredTensor, weights: Checkpoint, scale: Tensor | None) -> None:
        """Bring one stored tensor to where it will live."""
        with self._on_own_stream():
            dtype = DTYPES.get(stored.entry.dtype)
            if dtype is None or stored.value is not None or name in self._stays:
                [(_, mapped)] = weights.select([name]).read()
                for key, value in self._converted(name, mapped, scale):
                    self._put(key, value)
            elif self._is_as_wanted(name, dtype, scale):
                slab, view = self._place_of[name]
                self._read_into(view, stored)
                self._arrived(name, slab, view)
            else:
                with self._conversions:
                    raw = torch.empty(stored.entry.shape, dtype=dtype, device=self._device)
                    self._read_into(raw, stored)
                    for key, value in self._converted(name, raw, scale):
                        self._put(key, value)

    def _is_as_wanted(self, name: str, dtype: torch.dtype, scale: Tensor | None) -> bool:
        if scale is not None or _is_quantised(self._module, name):
            return False
        return dtype == _wanted(self._module, name) or not dtype.is_floating_point

    def _converted(self, name: str, tensor: Tensor, scale: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """A stored tensor as what the module holds for it: itself, or a quantised weight and its scales."""
        if self._is_as_wanted(name, tensor.dtype, scale):
            yield name, tensor
            return
        rotation = self._rotations.get(name, 0)
        value = tensor.to(self._device)  # before the cast: fewer bytes to move, and a GPU casts faster
        scale = None if scale is None else scale.to(self._device)
        owner = _owner(self._module, name)
        if isinstance(owner, QuantizedLinear) and _is_quantised(self._module, name):
            weight, factors = stored_weight(owner, value, scale, rotation)
            yield name, weight
            yield f"{name}_scale", factors
        else:
            scaled = value if scale is None else apply_scale(value, scale, rotation)
            yield name, scaled.to(_wanted(self._module, name))

    def _put(self, key: str, value: Tensor) -> None:
        stays = self._stays.get(key)
        if stays is not None:
            self._left[key] = value.cpu()
            with self._lock:
                self._progress.add(value.nbytes if key in self._streams else 0)
            return
        slab, view = self._place_of[key]
        view.copy_(value)
        self._arrived(key, slab, view)

    def _arrived(self, key: str, slab: _Slab, view: Tensor) -> None:
        with self._lock:
            slab.missing.discard(key)
            complete = not slab.missing
            self._progress.add(view.numel() * view.element_size())
        if complete and slab.host is not None:
            slab.host = self._memory.pin(slab.host)

    def _read_into(self, target: Tensor, stored: StoredTensor) -> None:
        """Fill a tensor from its file; on a device through this thread's pinned buffer.

        Reading is several times as fast as touching the pages of a mapped file for the first time.
        """
        there = target.reshape(-1).view(torch.uint8)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            if target.device.type != "cuda":
                _read_exactly(file, there)
                return
            buffer = self._local.buffer.tensor
            for piece in there.split(BUFFER_BYTES):
                read = buffer[: piece.numel()]
                _read_exactly(file, read)
                piece.copy_(read, non_blocking=True)
                self._local.stream.synchronize()

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Work of this thread in a stream of its own, complete at the end."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.buffer = self._memory.pin(self._memory.slab(BUFFER_BYTES))
            self._local.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._local.stream):
            yield
            self._local.stream.synchronize()

    def _give(self) -> list[Unit]:
        """Hang the tensors into the module."""
        units: list[Unit] = []
        ties = _ties(self._module)  # before tensors are replaced
        for slab in self._slabs:
            if slab.host is not None:
                unit = unit_of(slab.name, slab.members, slab.layout, slab.host)
                units.append(unit)
                views = unit.homes
            else:
                views = slab.layout.views(slab.memory)
            for member, view in zip(slab.members, views, strict=True):
                _hang(member, view)
        for key, member in self._stays.items():
            if member.tensor.is_meta:
                _hang(member, self._left[key])
        if self._placement.plan.source == "mapped":
            units = self._mapped_units()
        for owner, name, of, there in ties:
            owner._parameters[name] = of._parameters[there]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return units

    def _mapped_units(self) -> list[Unit]:
        units = []
        blocks = zip(self._placement.survey.blocks, self._placement.streamed, strict=True)
        for block, groups in blocks:
            layout, members = layout_for(groups)
            if members:
                homes = [member.tensor.detach() for member in members]
                units.append(Unit(name=block.name, members=members, layout=layout, homes=homes, slab=None))
        return units


def _made_here(module: nn.Module) -> list[str]:
    """Names in the state dict that come from quantising."""
    layers = module.named_modules()
    return [f"{name}.weight_scale" for name, layer in layers if isinstance(layer, QuantizedLinear)]


def _check_unchanged(module: nn.Module, placement: Placement, scaled: ScaledCheckpoint) -> None:
    """Weights that stay in the file must be of the module's type there.

    Raises:
        ValueError: if one is not.
    """
    for groups in placement.streamed:
        for member in (member for group in groups for member in group):
            stored = scaled.weights.tensors.get(member.key)
            dtype = stored and DTYPES.get(stored.entry.dtype)
            if member.key in scaled.scales or dtype != member.tensor.dtype:
                raise ValueError(
                    f"{member.key} is stored as {stored.entry.dtype if stored else 'nothing'} and needed "
                    f"as {member.tensor.dtype}: it cannot be used from the mapped file as it is. Take "
                    'source="pinned", or a checkpoint of that type.'
                )


def _tie(module: nn.Module) -> None:
    """Weights that share a tensor share it on the meta device too, so that it is placed once."""
    for name, target in tied_names(module).items():
        owner, of = (module.get_submodule(key.rpartition(".")[0]) for key in (name, target))
        owner._parameters[name.rpartition(".")[2]] = of._parameters[target.rpartition(".")[2]]


def _ties(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """Places of parameters that hang in another place too: (owner, name, other owner, name there)."""
    first: dict[int, tuple[nn.Module, str]] = {}
    ties = []
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in first:
                ties.append((owner, name, *first[id(parameter)]))
            first.setdefault(id(parameter), (owner, name))
    return ties


def _read_exactly(file: RawIOBase, target: Tensor) -> None:
    """Fill flat host memory from where the file stands.

    Raises:
        ValueError: if the file ends before.
    """
    left = memoryview(cast(Any, target.numpy()))
    while left:
        count = file.readinto(left)
        if not count:
            raise ValueError(f"{getattr(file, 'name', 'A file')} ended while it was read. Fetch it again.")
        left = left[count:]


def _is_quantised(module: nn.Module, name: str) -> bool:
    """Whether this is the weight of a quantised layer."""
    return isinstance(_owner(module, name), QuantizedLinear) and name.endswith(".weight")


def _owner(module: nn.Module, key: str) -> nn.Module:
    return module.get_submodule(key.rpartition(".")[0])


def _wanted(module: nn.Module, key: str) -> torch.dtype:
    owner, name = _owner(module, key), key.rpartition(".")[2]
    tensor = owner._parameters.get(name)
    return (owner._buffers[name] if tensor is None else tensor).dtype  # type: ignore[union-attr]


def _hang(member: Member, tensor: Tensor) -> None:
    """Replace a tensor on the meta device (or a buffer) by a real one."""
    old = member.owner._parameters.get(member.name)
    if old is not None:
        member.owner._parameters[member.name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        member.owner._buffers[member.name] = tensor
