"""Runs the components of a pipeline within a budget of device memory. See vram_plan.py for the plan."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusers_qwenimage.checkpoint import Checkpoint
from diffusers_qwenimage.offload import (
    Pinner,
    Source,
    StreamPlan,
    Surveys,
    adopt,
    finish_pinning,
    pinned_bytes,
    rest,
    stream,
    streamed,
    unpinned_bytes,
    unstream,
)
from diffusers_qwenimage.vae import TILING_ATTRIBUTES

from .needs import (
    Demand,
    adapter_bytes,
    bytes_on,
    decode_bytes,
    decodes_fused,
    fitting_tile,
    tile_stride,
    weight_bytes,
)
from .vram_plan import (
    GIB,
    Parts,
    PipelinePlan,
    plan_pipeline,
    too_small,
)

logger = logging.getLogger(__name__)

HOST_RESERVE = 3 * GIB  # host memory that is left alone when weights are pinned
VAE_METHODS = ("encode", "decode")
# Where the transformer and the text encoder wait: the text encoder runs once, the transformer in every step.
SOURCES: tuple[tuple[Source, Source], ...] = (
    ("pinned", "pinned"),
    ("pinned", "mapped"),
    ("mapped", "mapped"),
)
NEXT_TO_YIELD = {"pinned": "text encoder", "mapped": "transformer"}


class VramManager:
    """Keeps one pipeline's components within a budget.

    Args:
        parts: the components; they are taken again for every plan, so they can be replaced.
        device: what is computed on.
        budget: bytes for weights and activations; None: no limit.
        buffer, context: bytes that were taken off the user's limit before, for what is not foreseen and for
            CUDA itself.
        strict: refuse a picture that does not fit the budget; else it is made with as little as can be.
        persistent_parameters: the most parameters of the transformer that stay on the device.
        source: where streamed weights wait; None chooses pinned memory if there is enough, to which weights
            go from files in the background.
        show_progress: show bars while weights are placed.
        files: weights of components that are on the meta device, by the component's name.
    """

    def __init__(
        self,
        parts: Callable[[], Parts],
        device: torch.device,
        *,
        budget: int | None,
        buffer: int = 0,
        context: int = 0,
        strict: bool = False,
        persistent_parameters: int | None = None,
        source: Source | None = None,
        show_progress: bool = True,
        files: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.device = device
        self.budget = budget
        self.buffer = buffer
        self.context = context
        self._strict = strict
        self._parts = parts
        self._persistent = persistent_parameters
        self._source = source
        self._show_progress = show_progress
        self._files = dict(files or {})
        self._pinner = Pinner() if source is None else None
        self._vae: Any = None
        self._planned: tuple[int, ...] = ()
        self.plan: PipelinePlan | None = None

    @property
    def aside(self) -> int:
        """Bytes of the user's limit that are not planned."""
        return self.buffer + self.context

    def prepare(self, demand: Demand) -> None:
        """Place the weights for pictures like this, unless they lie well for them already.

        Raises:
            ValueError: if the budget is too small for them.
            torch.OutOfMemoryError, MemoryError: if there is less memory than the budget says.
        """
        parts = self._parts()
        state = _state_of(parts)
        if self.plan is not None and self._planned == state and self.plan.demand.covers(demand):
            return
        if self.plan is not None:
            demand = demand.joined(self.plan.demand)
            logger.info("A larger picture than was planned for, or other weights: planning anew.")
        plan = self._plan_for(parts, demand)
        self._place(parts, plan)
        self.plan, self._planned = plan, state
        logger.info("%s", "; ".join(f"{name} {size / GIB:.2f} GiB" for name, size in plan.peaks.items()))

    def finish_pinning(self) -> None:
        """Wait until everything that is to be pinned is."""
        for module in _streaming(self._parts()):
            finish_pinning(module)

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is pinned now."""
        return sum(map(pinned_bytes, _streaming(self._parts())))

    @property
    def unpinned_bytes(self) -> Mapping[str, int]:
        """What streams from files until it is pinned, by the name of the component."""
        parts = self._parts()
        named = {"transformer": parts.transformer, "text_encoder": parts.text_encoder}
        return {name: unpinned_bytes(module) for name, module in named.items() if module is not None}

    def stop_managing(self) -> None:
        """Let another manager take over: the weights stay as they are."""
        self._release_vae()

    def stop(self, device: torch.device | str = "cpu") -> None:
        """Undo everything: whole components on `device`."""
        self._release_vae()
        for module in (self._parts().transformer, self._parts().text_encoder):
            if module is not None:
                unstream(module, device=device)
        transformer, vae = self._parts().transformer, self._parts().vae
        if vae is not None:
            vae.to(device)
        if hasattr(transformer, "save_memory"):
            transformer.save_memory(False)
        self.plan = None

    @contextmanager
    def encoding_text(self) -> Iterator[None]:
        """While the text encoder works."""
        self._rest(self._parts().transformer)
        try:
            yield
        finally:
            self._rest(self._parts().text_encoder)

    @contextmanager
    def denoising(self, demand: Demand) -> Iterator[None]:
        """While the transformer works."""
        self._rest(self._parts().text_encoder)
        self.prepare(demand)
        try:
            yield
        finally:
            self._rest(self._parts().transformer)
            self._rest(self._parts().text_encoder)  # which may have been pinned meanwhile

    @contextmanager
    def using_vae(self, samples: int, rows: int, columns: int) -> Iterator[None]:
        """While the VAE works on so many pictures of `rows` x `columns` latent pixels."""
        parts = self._parts()
        self._rest(parts.transformer)
        self._rest(parts.text_encoder)
        with self._tiled(parts.vae, samples, rows, columns), visiting(parts.vae, self.device):
            yield
        _give_cache_back(self.device)

    def _plan_for(self, parts: Parts, demand: Demand) -> PipelinePlan:
        """The plan whose host memory can be pinned, the fastest first; the text encoder gives way first."""
        if self._source is not None:
            plan = self._plan_from(parts, demand, self._source, self._source)
            self._check_budget(parts, plan)
            return plan
        spare = psutil.virtual_memory().available - HOST_RESERVE + self.pinned_bytes
        for source, text_source in SOURCES:
            plan = self._plan_from(parts, demand, source, text_source)
            if source == text_source == "pinned":
                self._check_budget(parts, plan)
            if plan.host_bytes <= spare:
                break
            logger.warning(
                "%.1f GiB of host memory are too few to pin %.1f GiB: the %s is read where it lies, which is "
                "slower.",
                *(spare / GIB, plan.host_bytes / GIB, NEXT_TO_YIELD[text_source]),
            )
        return plan

    def _plan_from(self, parts: Parts, demand: Demand, source: Source, text_source: Source) -> PipelinePlan:
        return plan_pipeline(
            parts,
            self.budget,
            demand,
            device=str(self.device),
            source=source,
            text_source=text_source,
            persistent_parameters=self._persistent,
            strict=self._strict,
            aside=self.aside,
        )

    def _check_budget(self, parts: Parts, plan: PipelinePlan) -> None:
        """A budget that is too small may be exceeded, if the memory is there."""
        if self.budget is None or plan.budget is None or plan.budget <= self.budget:
            return
        problem = too_small(self.budget + self.aside, plan.budget + self.aside, plan.demand)
        if plan.budget > available_bytes(parts, self.device):
            raise ValueError(problem)
        if self.budget + self.aside > 0:
            logger.warning("%s It is exceeded.", problem)

    def _place(self, parts: Parts, plan: PipelinePlan) -> None:
        self._release_vae()
        self._stream(parts.text_encoder, plan.text_encoder, plan.surveys, "text_encoder")
        self._rest(parts.text_encoder)
        self._stream(parts.transformer, plan.transformer, plan.surveys, "transformer")
        self._rest(parts.transformer)
        if hasattr(parts.transformer, "save_memory"):
            parts.transformer.save_memory(plan.frugal)
        if parts.vae is not None:
            if plan.vae_stays:
                _give_cache_back(self.device)  # else its tensors keep parts of what was large
                parts.vae.to(self.device)
            elif bytes_on(parts.vae, self.device):  # of an earlier plan
                parts.vae.to("cpu")
            self._hold_vae(parts.vae)
        _give_cache_back(self.device)

    def _stream(
        self, module: Any, plan: StreamPlan | None, surveys: Mapping[str, Surveys], name: str
    ) -> None:
        """Place a component as planned: from its files, if it has no weights yet."""
        if module is None or plan is None:
            return
        if _is_placed(module, plan):
            if self._pinner is None:
                finish_pinning(module)
            return
        total = plan.resident_bytes + plan.streamed_bytes
        with tqdm(
            total=total,
            desc=f"Placing the {name.replace('_', ' ')}",
            unit="B",
            unit_scale=True,
            disable=not self._show_progress,
            leave=False,
        ) as bar:
            arguments: dict[str, Any] = {
                "device": self.device,
                "vram_limit": plan.vram_limit,
                "source": plan.source,
                "surveys": surveys[name],
                "progress": lambda done, _: bar.update(done - bar.n),
                "pinner": self._pinner,
            }
            if name in self._files:
                adopt(module, self._files[name], **arguments)
                del self._files[name]
            else:
                stream(module, **arguments)

    def _rest(self, module: Any) -> None:
        if module is not None:
            rest(module)
        _give_cache_back(self.device)

    @contextmanager
    def _tiled(self, vae: Any, samples: int, rows: int, columns: int) -> Iterator[None]:
        """Pictures one by one, and in tiles, where the budget asks for it."""
        if self.budget is None or self.plan is None:
            yield
            return
        held = weight_bytes(vae)
        budget = max(self.budget, self.plan.budget or 0)
        room = budget - self.plan.resident_bytes - (0 if self.plan.vae_stays else held)
        before = {name: getattr(vae, name) for name in ("use_tiling", "use_slicing", *TILING_ATTRIBUTES)}
        fused = decodes_fused(vae, self.device)
        if samples > 1 and samples * decode_bytes(vae, rows, columns, fused=fused) > room:
            vae.use_slicing = True
        tile = None if vae.use_tiling else fitting_tile(vae, rows, columns, room, fused=fused)
        if tile is not None:
            vae.enable_tiling(tile_size=tile, tile_stride=tile_stride(tile))
            side = tile * vae.spatial_compression_ratio
            logger.warning(
                "The VAE works in tiles of %dx%d pixels to stay within %.1f GiB; colours can differ a little "
                "between them.",
                *(side, side, budget / GIB),
            )
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(vae, name, value)

    def _hold_vae(self, vae: Any) -> None:
        for name in VAE_METHODS:
            vae.__dict__[name] = _Managed(self, vae, name)
        self._vae = vae

    def _release_vae(self) -> None:
        vae, self._vae = self._vae, None
        for name in VAE_METHODS if vae is not None else ():
            method = vae.__dict__.get(name)
            if isinstance(method, _Managed) and method.manager is self:  # not one that took over
                del vae.__dict__[name]


class _Managed:
    """A method of a VAE, within the budget of the pipeline around it."""

    def __init__(self, manager: VramManager, vae: Any, name: str) -> None:
        self.manager = manager
        self._vae = vae
        self._name = name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encode pixels or decode latents, [B, C, T, H, W]."""
        ratio = self._vae.spatial_compression_ratio if self._name == "encode" else 1
        with self.manager.using_vae(x.shape[0], x.shape[-2] // ratio, x.shape[-1] // ratio):
            return getattr(type(self._vae), self._name)(self._vae, x, *args, **kwargs)


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Weights copied to a device, and dropped there afterwards: those on the host stay as they are."""
    homes: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device != device:
                homes.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def available_bytes(parts: Parts, device: torch.device) -> int:
    """Memory of a device that these components may have: what is free, and what is theirs already."""
    own = sum(bytes_on(module, device) for module in (parts.transformer, parts.text_encoder, parts.vae))
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) + own
    free, total = torch.cuda.mem_get_info(device)
    in_use = torch.cuda.memory_allocated(device)
    idle = torch.cuda.memory_reserved(device) - in_use
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.8
    allowed = total if share is None else int(total * share(device)) - in_use
    return min(free + idle, allowed) + own


def _is_placed(module: nn.Module, plan: StreamPlan) -> bool:
    """Whether a module streams as planned; its own budget may be another as long as it comes to the same."""
    now = streamed(module)
    return now is not None and _placing(now) == _placing(plan)


def _placing(plan: StreamPlan) -> tuple[object, ...]:
    return plan.blocks, plan.num_slots, plan.source, set(plan.on_call)


def _streaming(parts: Parts) -> list[Any]:
    return [module for module in (parts.transformer, parts.text_encoder) if module is not None]


def _state_of(parts: Parts) -> tuple[int, ...]:
    """Something that changes when components are replaced or adapters come and go."""
    modules: Sequence[Any] = (parts.transformer, parts.text_encoder, parts.vae)
    return (*map(id, modules), *map(adapter_bytes, modules))


def _give_cache_back(device: torch.device) -> None:
    """Keep the allocator's reserve near what is in use: the moments use blocks of other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
