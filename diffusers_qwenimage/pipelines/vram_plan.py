"""Which component is where, and when, so that a whole picture is made within a budget of device memory.

The transformer comes first: it runs in every step. Its weights stay on the device as far as they fit beside
the activations of a step, the rest streams. The text encoder streams through the memory that the activations
need later, unless there is room for it too. The VAE visits the device; it decodes in tiles if it has to. So
at the four moments of a picture

    text      resident weights + slots and activations of the text encoder
    tabulate  resident weights + the modulation's, two blocks at a time, and what is computed of them
    denoise   resident weights + slots of the transformer + that table + activations of a step
    decode    resident weights + the VAE + its activations

are on the device, and each fits the budget. Sizes in bytes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffusers_qwenimage.offload import Source, StreamPlan, Surveys, plan_stream, surveys_of

from .needs import (
    TILE_SIDES,
    Demand,
    adapter_bytes,
    decode_bytes,
    decodes_fused,
    denoise_bytes,
    denoises_fused,
    encode_text_bytes,
    fitting_tile,
    tabulate_bytes,
    weight_bytes,
)
from .text_survey import text_encoder_surveys

GIB = 2**30
PREFERRED_TILE = 80  # latent pixels: tiles are not made smaller to keep more of the transformer resident
HALVINGS = 8


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Where everything is.

    Attributes:
        budget: what may be used; None: no limit.
        demand: the largest picture that it was made for.
        transformer, text_encoder: what streams of them; None where there is no such component.
        surveys: of both, by name, to place them by.
        vae_bytes: weights of the VAE.
        vae_stays: whether they stay on the device.
        adapter_bytes: of LoRA layers, on the device.
        encode_bytes, tabulate_bytes, denoise_bytes, decode_bytes: beside the weights, in each of the moments.
        tile: side of a tile in latent pixels when the largest picture is decoded, None for no tiles.
        frugal: whether the transformer saves memory, for time: `save_memory()`.
        smallest_bytes: the smallest budget that works for this demand.
    """

    budget: int | None
    demand: Demand
    transformer: StreamPlan | None
    text_encoder: StreamPlan | None
    surveys: Mapping[str, Surveys] = field(repr=False)
    vae_bytes: int
    vae_stays: bool
    adapter_bytes: int
    encode_bytes: int
    tabulate_bytes: int
    denoise_bytes: int
    decode_bytes: int
    tile: int | None
    frugal: bool
    smallest_bytes: int

    @property
    def resident_bytes(self) -> int:
        """On the device all the time."""
        plans = [plan.resident_bytes for plan in (self.transformer, self.text_encoder) if plan]
        return sum(plans) + self.adapter_bytes + (self.vae_bytes if self.vae_stays else 0)

    @property
    def peaks(self) -> Mapping[str, int]:
        """Expected peak of each moment."""
        base = self.resident_bytes
        return {
            "text": base + _slots(self.text_encoder) + self.encode_bytes if self.text_encoder else 0,
            "tabulate": base + self.tabulate_bytes,
            "denoise": base + _slots(self.transformer) + self.denoise_bytes,
            "decode": base + (0 if self.vae_stays else self.vae_bytes) + self.decode_bytes,
        }

    @property
    def peak_bytes(self) -> int:
        """Expected peak of the whole."""
        return max(self.peaks.values())

    @property
    def host_bytes(self) -> int:
        """Pinned host memory."""
        return sum(plan.pinned_bytes for plan in (self.transformer, self.text_encoder) if plan)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is planned for; None for a component that is not there."""

    transformer: Any
    text_encoder: Any
    vae: Any


def plan_pipeline(
    parts: Parts,
    budget: int | None,
    demand: Demand,
    *,
    device: str,
    source: Source = "pinned",
    text_source: Source | None = None,
    persistent_parameters: int | None = None,
    strict: bool = True,
    aside: int = 0,
    fused: bool | None = None,
) -> PipelinePlan:
    """Plan a pipeline; nothing is touched.

    Args:
        budget: bytes for weights and activations; None: no limit.
        source: where the weights that stream wait.
        text_source: the same for the text encoder; None: as `source`.
        strict: refuse a budget that is too small; else the plan is for the smallest that works.
        persistent_parameters: the most parameters of the transformer that may stay on the device.
        aside: what was taken off the user's limit before, for messages.
        fused: whether transformer and VAE take their fused paths; None: as they would on this machine.

    Raises:
        ValueError: if the budget is too small; it says what the smallest is.
    """
    planner = _Planner(
        parts,
        demand,
        device=device,
        source=source,
        text_source=text_source or source,
        persistent=persistent_parameters,
        fused=fused,
    )
    enough = planner.smallest(overlapping=True).peak_bytes
    planner.save_memory()
    smallest = planner.smallest().peak_bytes
    if budget is not None and budget < smallest:
        if strict:
            raise ValueError(too_small(budget + aside, smallest + aside, demand))
        budget = smallest
    planner.save_memory(budget is not None and budget < enough)
    return planner.best(budget, smallest)


def too_small(budget: int, smallest: int, demand: Demand) -> str:
    """What to say of a limit that cannot work."""
    size = f"{16 * demand.columns}x{16 * demand.rows}"
    least = math.ceil(100 * smallest / GIB) / 100
    return (
        f"{budget / GIB:.2f} GiB are too few for pictures of {size} pixels: "
        f"the smallest budget that works is {least:.2f} GiB. "
        "Give that, make smaller pictures, or take 8-bit weights."
    )


class _Planner:
    def __init__(
        self,
        parts: Parts,
        demand: Demand,
        *,
        device: str,
        source: Source,
        text_source: Source,
        persistent: int | None,
        fused: bool | None,
    ) -> None:
        self._parts = parts
        self._demand = demand
        self._device = device
        self._source = source
        self._text_source = text_source
        self._persistent = persistent
        self._vae_bytes = weight_bytes(parts.vae)
        self._fused_vae = decodes_fused(parts.vae, torch.device(device)) if fused is None else fused
        self._fused = denoises_fused(parts.transformer, torch.device(device)) if fused is None else fused
        self._adapters = adapter_bytes(parts.transformer) + adapter_bytes(parts.text_encoder)
        self._denoise = self._tabulate = 0
        self._frugal = False
        self.save_memory(False)
        self._encode = encode_text_bytes(parts.text_encoder, demand) if parts.text_encoder is not None else 0
        self._surveys: dict[str, Surveys] = {}
        self._plans: dict[tuple[str, int | None], StreamPlan] = {}

    def save_memory(self, enabled: bool = True) -> None:
        """Plan for a transformer that saves memory, if it can: on the fused path."""
        transformer = self._parts.transformer
        self._frugal = enabled and self._fused
        if transformer is not None:
            dtype = compute_dtype(self._parts)
            self._tabulate = tabulate_bytes(transformer, self._demand, dtype)
            self._denoise = denoise_bytes(
                transformer, self._demand, dtype, fused=self._fused, frugal=self._frugal
            )

    def smallest(self, *, overlapping: bool = False) -> PipelinePlan:
        """Nothing resident that can stream, the smallest tiles, one slot (or enough to copy meanwhile)."""
        transformer = self._overlapping_transformer() if overlapping else self._transformer(0)
        text = self._text_encoder(0)
        return self._plan(None, transformer, text, vae_stays=False, tile=TILE_SIDES[-1], smallest=0)

    def best(self, budget: int | None, smallest: int) -> PipelinePlan:
        """As much resident as the budget allows, the transformer first."""
        whole = self._plan(
            budget,
            self._transformer(None),
            self._text_encoder(None),
            vae_stays=True,
            tile=None,
            smallest=smallest,
        )
        if self._persistent is None and (budget is None or whole.peak_bytes <= budget):
            return whole
        budget = whole.peak_bytes if budget is None else budget
        least = self._text_encoder(0)
        transformer = self._fitting_transformer(budget, least)
        basic = self._with_vae(budget, transformer, least, smallest)
        for text in self._text_encoders(budget, basic, least):
            plan = self._with_vae(budget, transformer, text, smallest)
            if plan.peak_bytes <= budget and plan.tile == basic.tile:  # no tiles for its sake
                return plan
        return self._with_vae(budget, self._transformer(0), least, smallest)

    def _with_vae(
        self, budget: int, transformer: StreamPlan | None, text: StreamPlan | None, smallest: int
    ) -> PipelinePlan:
        """The VAE on the device if there is room, else in tiles if there must be."""
        for stays in (True, False):
            plan = self._plan(budget, transformer, text, vae_stays=stays, tile=None, smallest=smallest)
            if plan.peak_bytes <= budget:
                return plan
        tile = self._tile(budget - plan.resident_bytes - self._vae_bytes)
        return self._plan(budget, transformer, text, vae_stays=False, tile=tile, smallest=smallest)

    def _text_encoders(
        self, budget: int, basic: PipelinePlan, least: StreamPlan | None
    ) -> Iterator[StreamPlan | None]:
        """Ways to hold the text encoder, the best first: whole, in what is left, copying while it computes,
        the least."""
        if least is not None:
            yield self._text_encoder(None, in_full=False)
            yield self._fitting_text_encoder(budget, basic, least)
            yield self._text_encoder(least.smallest_overlapping_bytes)
        yield least

    def _fitting_text_encoder(self, budget: int, basic: PipelinePlan, least: StreamPlan) -> StreamPlan | None:
        """As much of it resident as fits beside everything else, which is as in the plan with the least."""
        spare = budget - basic.resident_bytes + least.resident_bytes
        others = max(peak for moment, peak in basic.peaks.items() if moment != "text") - basic.resident_bytes
        return self._most_resident(self._text_encoder, spare - self._encode, spare - others)

    def _fitting_transformer(self, budget: int, text: StreamPlan | None) -> StreamPlan | None:
        """The plan with most resident weights whose moments fit the budget."""
        aside = _resident(text) + self._adapters
        limit = budget - aside - self._denoise
        stays = _resident(self._overlapping_transformer())
        sides = [side for side in TILE_SIDES if side <= PREFERRED_TILE]
        peaks = [self._peak_of_decoding(side) for side in ([None] if self._fused_vae else []) + sides]
        decode = next((peak for peak in peaks if peak <= budget - aside - stays), peaks[-1])
        others = max(_slots(text) + self._encode, self._tabulate, decode)
        most = budget - aside - others
        if self._persistent is not None:
            most = min(most, self._persistent * compute_dtype(self._parts).itemsize)
        return self._most_resident(self._transformer, limit, most)

    def _most_resident(
        self, planned: Callable[[int], StreamPlan | None], limit: int, most: int
    ) -> StreamPlan | None:
        """Of the plans within a limit the one with most resident weights, but no more than `most`."""
        least, plan = planned(0), planned(max(limit, 0))
        most = max(most, _resident(least))
        if _resident(plan) <= most or least is None:
            return plan
        # Not all of the limit may stay: halve the way to the least, since a smaller limit has other slots.
        low, high, plan = 0, limit, least
        overlapping = planned(least.smallest_overlapping_bytes)
        assert overlapping is not None
        if overlapping.device_bytes <= limit and _resident(overlapping) <= most:
            plan, low = overlapping, overlapping.device_bytes
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            tried = planned(middle)
            if _resident(tried) <= most:
                plan, low = tried, middle
            else:
                high = middle
        return plan

    def _tile(self, room: int) -> int | None:
        if self._parts.vae is None:
            return None
        rows, columns = 2 * self._demand.rows, 2 * self._demand.columns
        return fitting_tile(self._parts.vae, rows, columns, room, fused=self._fused_vae)

    def _peak_of_decoding(self, tile: int | None) -> int:
        """Weights of the VAE and what decoding takes, in tiles of a side."""
        if self._parts.vae is None:
            return 0
        rows, columns = 2 * self._demand.rows, 2 * self._demand.columns
        size = decode_bytes(self._parts.vae, rows, columns, tile=tile, fused=self._fused_vae)
        return self._vae_bytes + size

    def _overlapping_transformer(self) -> StreamPlan | None:
        """The least with which copies are hidden behind the work."""
        least = self._transformer(0)
        return None if least is None else self._transformer(least.smallest_overlapping_bytes)

    def _transformer(self, limit: int | None) -> StreamPlan | None:
        return self._stream_plan("transformer", limit)

    def _text_encoder(self, limit: int | None, *, in_full: bool = True) -> StreamPlan | None:
        if limit is None and not in_full and self._parts.text_encoder is not None:
            limit = weight_bytes(self._parts.text_encoder)  # fits, but need not hold what never runs
        return self._stream_plan("text_encoder", limit)

    def _stream_plan(self, name: str, limit: int | None) -> StreamPlan | None:
        """A plan within a limit, or the smallest if that is more."""
        if getattr(self._parts, name) is None:
            return None
        if limit is not None:
            limit = max(limit, self._planned(name, None).smallest_bytes)
        return self._planned(name, limit)

    def _planned(self, name: str, limit: int | None) -> StreamPlan:
        module: Any = getattr(self._parts, name)
        if name not in self._surveys:
            take_apart = text_encoder_surveys if name == "text_encoder" else surveys_of
            self._surveys[name] = take_apart(module)
        if (name, limit) not in self._plans:
            self._plans[name, limit] = plan_stream(
                module,
                limit,
                device=self._device,
                source=self._text_source if name == "text_encoder" else self._source,
                surveys=self._surveys[name],
            )
        return self._plans[name, limit]

    def _plan(
        self,
        budget: int | None,
        transformer: StreamPlan | None,
        text: StreamPlan | None,
        *,
        vae_stays: bool,
        tile: int | None,
        smallest: int,
    ) -> PipelinePlan:
        decode = self._peak_of_decoding(tile) - self._vae_bytes
        plan = PipelinePlan(
            budget=budget,
            demand=self._demand,
            transformer=transformer,
            text_encoder=text,
            surveys=self._surveys,
            vae_bytes=self._vae_bytes,
            vae_stays=vae_stays,
            adapter_bytes=self._adapters,
            encode_bytes=self._encode,
            tabulate_bytes=self._tabulate,
            denoise_bytes=self._denoise,
            decode_bytes=decode,
            tile=tile,
            frugal=self._frugal,
            smallest_bytes=smallest,
        )
        together = decode * self._demand.pictures  # else one after the other
        fits = budget is None or plan.peaks["decode"] - decode + together <= budget
        return replace(plan, decode_bytes=together) if tile is None and fits else plan


def compute_dtype(parts: Parts) -> torch.dtype:
    """The type of the activations: that of the first weight that is no 8-bit one."""
    for parameter in () if parts.transformer is None else parts.transformer.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            dtype: torch.dtype = parameter.dtype
            return dtype
    return torch.bfloat16


def _slots(plan: StreamPlan | None) -> int:
    return 0 if plan is None else plan.slot_bytes


def _resident(plan: StreamPlan | None) -> int:
    return 0 if plan is None else plan.resident_bytes
