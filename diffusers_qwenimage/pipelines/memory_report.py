"""What is where, and what it costs: for people, and as numbers."""

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
        on_call: stays on the host, and comes for a call or never.
    """

    name: str
    resident: int
    slots: int
    streamed: int
    source: str
    on_call: int


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Of a pipeline; `str()` is for reading.

    Attributes:
        device: what it computes on.
        budget: bytes, None without one.
        demand: the largest picture it is placed for.
        components: of the pipeline.
        peaks: expected peak of each moment, in bytes.
        smallest: the smallest budget for such pictures.
        pinned: host memory that is pinned.
        tile: side of the VAE's tiles in picture pixels, None without tiles.
        frugal: whether the branches of the guidance run one after the other, to save memory.
        seconds_per_step: estimated.
        seconds_resident: estimated, with all weights on the device.
        rates: what the estimates are from.
        measured_peak: the process's peak on the device so far, None on a CPU.
    """

    device: str
    budget: int | None
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
        d = self.demand
        budget = "no limit" if self.budget is None else f"budget {_size(self.budget)}"
        guided = ", guided" if d.guided else ""
        made = f"{d.pictures} picture(s) of {16 * d.columns}x{16 * d.rows}{guided}"
        lines = [
            f"Memory on {self.device}: {budget}, for {made}",
            f"  {'':14}{'resident':>10}{'slots':>10}{'streams':>10}{'on host':>10}",
        ]
        for part in self.components:
            sizes = (part.resident, part.slots, part.streamed, part.on_call)
            source = f"  from {SOURCE_NAMES[part.source]}" if part.source else ""
            lines.append(f"  {part.name:14}" + "".join(f"{_size(size):>10}" for size in sizes) + source)
        peaks = ", ".join(f"{name} {_size(size)}" for name, size in self.peaks.items() if size)
        lines.append(
            f"  expected peak  {_size(max(self.peaks.values()))} ({peaks}); smallest {_size(self.smallest)}"
        )
        if self.measured_peak is not None:
            lines.append(f"  measured peak  {_size(self.measured_peak)} of this process so far")
        if self.tile is not None:
            lines.append(f"  the VAE decodes in tiles of {self.tile}x{self.tile} pixels")
        if self.frugal:
            lines.append("  the branches of the guidance run one after the other, which takes less memory")
        rates = f"{self.rates.flops / 1e12:.3g} TFLOP/s and {self.rates.link / 1e9:.3g} GB/s"
        lines.append(
            f"  time per step  about {_time(self.seconds_per_step)} ({_time(self.seconds_resident)} with all "
            f"weights on the device); estimated from {rates}, "
            f"{'measured here' if self.rates.measured else 'assumed'}"
        )
        return "\n".join(lines)

    __repr__ = __str__


SOURCE_NAMES = {"pinned": "pinned memory", "mapped": "the file, or memory as it is"}


def component_reports(plan: PipelinePlan) -> tuple[ComponentReport, ...]:
    """One for each component of a plan."""
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
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
