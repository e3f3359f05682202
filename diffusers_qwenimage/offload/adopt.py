"""Weights from files straight to where they will live, each once.

    transformer = empty_module(lambda: QwenImageTransformer2DModel.from_config(config)).to(torch.bfloat16)
    quantize_(transformer, "fp8")                       # if wanted: on the meta device it costs nothing
    adopt(transformer, checkpoint, device="cuda", vram_limit=12 * 2**30)

The module is on the meta device. Several threads read: what streams goes from the file into the pinned slab
of its block, what stays goes to the device through a small pinned buffer, and weights of quantised layers are
quantised on the device on their way. What is only used on call stays in the mapped file, as does what streams
with `source="mapped"`, and with a `Pinner` until that has pinned it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_qwenimage.checkpoint import Checkpoint
from diffusers_qwenimage.checkpoint.assign import check_fits
from diffusers_qwenimage.checkpoint.reader import DTYPES, StoredTensor
from diffusers_qwenimage.checkpoint.scaled import ScaledCheckpoint, apply_scale, split_scales
from diffusers_qwenimage.quantize import QuantizedLinear
from diffusers_qwenimage.quantize.stored import stored_weight

from .empty import hang, is_quantised, made_here, owner_of, tie, ties, wanted_type
from .layout import Layout
from .memory import HostMemory, HostSlab, device_slab
from .pinning import Pinner
from .placing import Progress, layout_for, unit_of
from .plan import Placement, Source, StreamPlan, Surveys, make_plan
from .reading import Files, Piece, cut, runs_of
from .ring import Unit
from .state import Streaming
from .stored import check_as_used, in_files_as_used, is_as_used
from .stream import device_of
from .survey import Group, Member

READERS = 8
CONVERSIONS = (
    2  # weights that are quantised or scaled at a time: each takes a few times its size on the device
)
BUFFER_BYTES = 32 * 2**20  # pinned, per reader, for what stays on the device
RUN_BYTES = 256 * 2**20  # that a reader asks for at once, for what streams


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
    pinner: Pinner | None = None,
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
        pinner: what streams from pinned memory stays in the mapped file for now, as far as it is there as it
            is used, and is pinned when the module has been used once; None: it is pinned here.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, or the file is quantised in an
            unknown way; if the budget is too small; if weights that should stay in the mapped file would have
            to be converted. Nothing is read then.
        MemoryError, torch.OutOfMemoryError: if there is not enough memory; the module is on meta as before.
    """
    scaled = split_scales(weights)
    check_fits(module, scaled.weights, optional=made_here(module))
    tie(module)
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
        check_as_used(placement, scaled)

    def place(placement: Placement, device: torch.device, progress: Progress) -> list[Unit]:
        return _Adoption(module, placement, device, progress, may_wait=pinner is not None).run(scaled)

    Streaming(module, placement, target, pinner).start(place, progress)
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
        may_wait: whether what streams may be pinned later.
    """

    def __init__(
        self,
        module: nn.Module,
        placement: Placement,
        device: torch.device,
        progress: Progress,
        *,
        may_wait: bool,
    ) -> None:
        self._module = module
        self._placement = placement
        self._device = device
        self._progress = progress
        self._may_wait = may_wait
        self._memory = HostMemory(device)
        self._slabs: list[_Slab] = []
        self._place_of: dict[str, tuple[_Slab, Tensor]] = {}
        self._unread: dict[str, int] = {}  # bytes of what is read in pieces
        self._files = Files()
        self._left: dict[str, Tensor] = {}  # what stays as it is on the host, by name
        self._stays: dict[str, Member] = {}
        self._rotations: Mapping[str, int] = {}  # of weights whose columns are rotated in the file
        self._streams: set[str] = set()  # of what stays, the part that the plan counts
        self._lock = threading.Lock()
        self._conversions = threading.Semaphore(CONVERSIONS)
        self._local = threading.local()

    def run(self, scaled: ScaledCheckpoint) -> list[Unit]:
        """Read everything, and give the module its tensors."""
        self._prepare(scaled)
        self._rotations = scaled.rotations
        factors = dict(Checkpoint(tensors=scaled.scales, metadata={}).read())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # who had the slabs' memory before is done with it
        as_wanted, others = self._sorted(scaled)
        with self._files, ThreadPoolExecutor(READERS if self._device.type == "cuda" else 1) as pool:
            # What the device gets first: its calls would wait for memory that is being pinned.
            jobs = [pool.submit(self._send, run) for run in self._runs(as_wanted, to_device=True)]
            jobs += [pool.submit(self._take, name, scaled, factors.get(name)) for name in others]
            jobs += [pool.submit(self._read, run) for run in self._runs(as_wanted, to_device=False)]
            self._wait_for(jobs)
        return self._give()

    def _sorted(self, scaled: ScaledCheckpoint) -> tuple[list[Piece], list[str]]:
        """What is read as it is stored, and the names of what is left where it is or converted."""
        as_wanted: list[Piece] = []
        others: list[str] = []
        for name, stored in scaled.weights.tensors.items():
            dtype = DTYPES.get(stored.entry.dtype)
            is_mapped = dtype is None or stored.value is not None or name in self._stays
            if is_mapped or not self._is_as_wanted(name, dtype, name in scaled.scales):
                others.append(name)
                continue
            memory = _flat(self._place_of[name][1])
            self._unread[name] = memory.numel()
            as_wanted.append(Piece(name=name, file=stored.file, offset=stored.offset, memory=memory))
        return as_wanted, others

    @staticmethod
    def _runs(pieces: Sequence[Piece], *, to_device: bool) -> list[list[Piece]]:
        chosen = [piece for piece in pieces if (piece.memory.device.type == "cuda") == to_device]
        if to_device:
            chosen = [part for piece in chosen for part in cut(piece, BUFFER_BYTES)]
        return runs_of(chosen, BUFFER_BYTES if to_device else RUN_BYTES)

    @staticmethod
    def _wait_for(jobs: Sequence[Future[None]]) -> None:
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()  # those that have not begun, after one has failed

    def _prepare(self, scaled: ScaledCheckpoint) -> None:
        parts = self._placement.survey
        mapped = self._placement.plan.source == "mapped"
        self._add_slab("", parts.rest, resident=True)
        rows = zip(parts.blocks, self._placement.resident, self._placement.streamed, strict=True)
        for block, resident, streamed in rows:
            self._add_slab(block.name, block.small, resident=True)
            self._add_slab(block.name, resident, resident=True)
            if mapped or (self._may_wait and in_files_as_used(self._module, streamed, scaled)):
                keys = {m.key: m for group in streamed for m in group}
                self._stays.update(keys)
                self._streams.update(keys)
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
    def _read(self, run: Sequence[Piece]) -> None:
        """Fill host memory; no call of CUDA but to pin a slab that is complete."""
        self._files.read(run[0].file, run[0].offset, [piece.memory for piece in run])
        self._have_arrived(run)

    @torch.no_grad()
    def _send(self, run: Sequence[Piece]) -> None:
        """Read into this thread's pinned buffer, and send it to the device."""
        with self._on_own_stream():
            buffer = self._local.buffer.tensor[: run[-1].end - run[0].offset]
            self._files.read(run[0].file, run[0].offset, [buffer])
            for piece, read in zip(run, buffer.split([p.memory.numel() for p in run]), strict=True):
                piece.memory.copy_(read, non_blocking=True)
        self._have_arrived(run)

    @torch.no_grad()
    def _take(self, name: str, scaled: ScaledCheckpoint, scale: Tensor | None) -> None:
        """Convert one stored tensor, or leave it where it is."""
        stored = scaled.weights.tensors[name]
        dtype = DTYPES.get(stored.entry.dtype)
        if name in self._stays and self._is_as_wanted(name, dtype, scale is not None):
            [(_, mapped)] = scaled.weights.select([name]).read()
            self._put(name, mapped)
            return
        with self._on_own_stream():
            if dtype is None or stored.value is not None or name in self._stays:
                [(_, raw)] = scaled.weights.select([name]).read()
                for key, value in self._converted(name, raw, scale):
                    self._put(key, value)
                return
            with self._conversions:
                raw = torch.empty(stored.entry.shape, dtype=dtype, device=self._device)
                self._read_into(raw, stored)
                for key, value in self._converted(name, raw, scale):
                    self._put(key, value)

    def _is_as_wanted(self, name: str, dtype: torch.dtype | None, is_scaled: bool) -> bool:
        return is_as_used(self._module, name, dtype, is_scaled=is_scaled)

    def _converted(self, name: str, tensor: Tensor, scale: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """A stored tensor as what the module holds for it: itself, or a quantised weight and its scales."""
        if self._is_as_wanted(name, tensor.dtype, scale is not None):
            yield name, tensor
            return
        rotation = self._rotations.get(name, 0)
        value = tensor.to(self._device)  # before the cast: fewer bytes to move, and a GPU casts faster
        scale = None if scale is None else scale.to(self._device)
        owner = owner_of(self._module, name)
        if isinstance(owner, QuantizedLinear) and is_quantised(self._module, name):
            weight, factors = stored_weight(owner, value, scale, rotation)
            yield name, weight
            yield f"{name}_scale", factors
        else:
            scaled = value if scale is None else apply_scale(value, scale, rotation)
            yield name, scaled.to(wanted_type(self._module, name))

    def _put(self, key: str, value: Tensor) -> None:
        stays = self._stays.get(key)
        if stays is not None:
            self._left[key] = value.cpu()
            with self._lock:
                self._progress.add(value.nbytes if key in self._streams else 0)
            return
        view = self._place_of[key][1]
        view.copy_(value)
        with self._lock:
            self._unread[key] = view.nbytes
        self._have_arrived([Piece(name=key, file=Path(), offset=0, memory=_flat(view))])

    def _have_arrived(self, pieces: Sequence[Piece]) -> None:
        complete: list[_Slab] = []
        with self._lock:
            for piece in pieces:
                slab = self._place_of[piece.name][0]
                self._unread[piece.name] -= piece.memory.numel()
                self._progress.add(piece.memory.numel())
                if self._unread[piece.name] == 0:
                    slab.missing.discard(piece.name)
                    complete += [] if slab.missing else [slab]
        for slab in complete:
            if slab.host is not None:
                slab.host = self._memory.pin(slab.host)

    def _read_into(self, target: Tensor, stored: StoredTensor) -> None:
        """Fill a tensor from its file; on a device through this thread's pinned buffer.

        Reading is several times as fast as touching the pages of a mapped file for the first time.
        """
        whole = Piece(name=stored.key, file=stored.file, offset=stored.offset, memory=_flat(target))
        if target.device.type != "cuda":
            self._files.read(stored.file, stored.offset, [whole.memory])
            return
        for piece in cut(whole, BUFFER_BYTES):
            read = self._local.buffer.tensor[: piece.memory.numel()]
            self._files.read(piece.file, piece.offset, [read])
            piece.memory.copy_(read, non_blocking=True)
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
        units: dict[str, Unit] = {}
        shared = ties(self._module)  # before tensors are replaced
        for slab in self._slabs:
            if slab.host is not None:
                unit = unit_of(slab.name, slab.members, slab.layout, slab.host)
                units[slab.name] = unit
                views = unit.homes
            else:
                views = slab.layout.views(slab.memory)
            for member, view in zip(slab.members, views, strict=True):
                hang(member, view)
        for key, member in self._stays.items():
            if member.tensor.is_meta:
                hang(member, self._left[key])
        for owner, name, of, there in shared:
            owner._parameters[name] = of._parameters[there]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._with_mapped(units)

    def _with_mapped(self, units: Mapping[str, Unit]) -> list[Unit]:
        """All units in the order of the blocks: those in slabs, and those that are left where they are."""
        found = []
        for block, groups in zip(self._placement.survey.blocks, self._placement.streamed, strict=True):
            layout, members = layout_for(groups)
            if block.name in units:
                found.append(units[block.name])
            elif members:
                homes = [member.tensor.detach() for member in members]
                found.append(Unit(name=block.name, members=members, layout=layout, homes=homes, slab=None))
        return found


def _flat(tensor: Tensor) -> Tensor:
    """Its bytes."""
    return tensor.reshape(-1).view(torch.uint8)
