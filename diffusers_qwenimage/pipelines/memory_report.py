"""What is where, and what it costs: for people, and as numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

from .needs import Demand
from .rates import Rates
from .vram_plan import GIB, PipelinePlan


@dataclass(frozen=True, kw_only=True)
class ComponentReport:
    """One component, in bytes.

    Attributes:
        name: of the component.
        resident: on the device all the time.
        slots: on the device while it works, for what streams.
        streamed: copied to the device in each pass.
        source: where that comes from: "pinned" host memory, a "mapped" file, or "" if nothing streams.
        unpinned: of what streams from pinned memory, what comes from the file until it is pinned.
        on_call: stays on the host, and comes for a call or never.
    """

    name: str
    resident: int
    slots: int
    streamed: int
    source: str
    on_call: int
    unpinned: int = 0

    def __str__(self) -> str:
        """A row of a table."""
        sizes = (self.resident, self.slots, self.streamed, self.on_call)
        source = f"  from {SOURCE_NAMES[self.source]}" if self.source else ""
        if self.unpinned:
            source += f" ({_size(self.unpinned)} from the file until they are pinned)"
        return f"{self.name:14}" + "".join(f"{_size(size):>11}" for size in sizes) + source


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Of a pipeline; `str()` is for reading.

    Attributes:
        device: what it computes on.
        budget: bytes that may be in use on the device, None without a limit.
        buffer: of these, kept free for what was not foreseen.
        context: of these, what CUDA and its libraries will have.
        demand: the largest picture it is placed for.
        components: of the pipeline.
        peaks: expected peak of each moment, in bytes, beside buffer and context.
        smallest: the smallest budget for such pictures, buffer and context included.
        pinned: host memory that is pinned now.
        tile: side of the VAE's tiles in picture pixels, None without tiles.
        frugal: whether the transformer takes samples one by one, to save memory.
        seconds_per_step: estimated.
        seconds_resident: estimated, with all weights on the device.
        rates: what the estimates are from.
        measured_peak: the process's peak on the device so far, context included; None on a CPU.
    """

    device: str
    budget: int | None
    buffer: int
    context: int
    demand: Demand
    components: tuple[ComponentReport, ...]
    peaks: dict[str, int]
    smallest: int
    pinned: int
    tile: int | None
    frugal: bool
    seconds_per_step: float
    seconds_resident: float
    rates: Rates
    measured_peak: int | None

    def __str__(self) -> str:
        """A few lines."""
        lines = [
            f"Memory on {self.device}: {self._budget()}, for {self._pictures()}",
            f"  {'':14}{'resident':>11}{'slots':>11}{'streams':>11}{'on host':>11}",
            *(f"  {part}" for part in self.components),
            f"  expected peak  {self._expected()}; at least {_size(self.smallest)} are needed",
        ]
        if self.measured_peak is not None:
            lines.append(f"  measured peak  {_size(self.measured_peak)} of this process so far")
        if self.tile is not None:
            lines.append(f"  the VAE decodes in tiles of {self.tile}x{self.tile} pixels")
        if self.frugal:
            lines.append(
                "  the transformer takes samples one by one, which saves memory and costs a little time"
            )
        rates = f"{_rate(self.rates.flops)}FLOP/s and {_rate(self.rates.link)}B/s"
        lines.append(
            f"  time per step  about {_time(self.seconds_per_step)} ({_time(self.seconds_resident)} with all "
            f"weights on the device), estimated from {rates}, "
            f"{'measured here' if self.rates.measured else 'assumed'}"
        )
        return "\n".join(lines)

    __repr__ = __str__

    def _budget(self) -> str:
        if self.budget is None:
            return "no limit"
        kept = f", {_size(self.buffer)} of it kept free" if self.buffer else ""
        return f"budget {_size(self.budget)}{kept}"

    def _pictures(self) -> str:
        d = self.demand
        size = f"{16 * d.columns}x{16 * d.rows}{', guided' if d.guided else ''}"
        return f"a picture of {size}" if d.pictures == 1 else f"{d.pictures} pictures of {size}"

    def _expected(self) -> str:
        moments = [f"{name} {_size(size)}" for name, size in self.peaks.items() if size]
        if self.context:
            moments.insert(0, f"CUDA {_size(self.context)}, then")
        peak = max(self.peaks.values()) + self.context
        return f"{_size(peak)} ({', '.join(moments).replace('then,', 'then')})"


SOURCE_NAMES = {"pinned": "pinned memory", "mapped": "the file, or memory as it is"}


def component_reports(plan: PipelinePlan, unpinned: Mapping[str, int]) -> tuple[ComponentReport, ...]:
    """One for each component of a plan; `unpinned`: by its name, what is still to be pinned of it."""
    reports = []
    for name, part in (("transformer", plan.transformer), ("text_encoder", plan.text_encoder)):
        if part is not None:
            reports.append(
                ComponentReport(
                    name=name,
                    resident=part.resident_bytes,
                    slots=part.slot_bytes,
                    streamed=part.streamed_bytes,
                    source=part.source if part.streamed_bytes else "",
                    on_call=part.on_call_bytes,
                    unpinned=unpinned.get(name, 0),
                )
            )
    stays = plan.vae_bytes if plan.vae_stays else 0
    reports.append(
        ComponentReport(
            name="vae", resident=stays, slots=plan.vae_bytes - stays, streamed=0, source="", on_call=0
        )
    )
    if plan.adapter_bytes:
        reports.append(
            ComponentReport(
                name="LoRA", resident=plan.adapter_bytes, slots=0, streamed=0, source="", on_call=0
            )
        )
    return tuple(reports)


def _size(num_bytes: int) -> str:
    if num_bytes == 0:
        return "-"
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def _rate(value: float) -> str:
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
