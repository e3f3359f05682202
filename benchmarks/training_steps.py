"""What `training.py` measures with: the batch of a step, its loss, gradients, times and memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import record
from torch import Tensor
from training_peers import DiffSynthTransformer, with_tensor_text
from training_small import relative

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.training.batch import Batch
from diffusers_qwenimage.training.graphs import StepGraphs
from diffusers_qwenimage.training.modulation import ModulationRows
from diffusers_qwenimage.training.objective import flow_matching_loss

GIB = 2**30
SIGMAS = (0.890625, 0.703125, 0.5, 0.296875)  # exact in bf16
TEXT_TOKENS = 128
TINY = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    device: torch.device
    side: int
    blocks: int
    tiny: bool
    steps: int
    modes: tuple[str, ...]
    vram_limit: float
    results: Path
    profile: bool = False

    def note(self, case: str, value: float, unit: str, peak: float | None = None) -> None:
        """A row of the table."""
        record("training", case, value, unit, peak_memory_gib=peak, path=self.results)

    def label(self, case: str) -> str:
        """The case with the picture's size."""
        return f"{self.side}x{self.side}, rank 32, {self.blocks} blocks, {case}"


def build(setting: Setting, dtype: torch.dtype) -> Any:
    """Our transformer with random weights, N(0, 0.02), norms 1; the same for every call."""
    with torch.device("meta"):
        ours = QwenImageTransformer2DModel(num_layers=setting.blocks, **(TINY if setting.tiny else {})).to(
            dtype
        )
    ours.to_empty(device=setting.device)
    generator = torch.Generator(setting.device).manual_seed(0)
    for name, parameter in ours.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return ours.requires_grad_(False)


def batch_of(model: Any, setting: Setting, dtype: torch.dtype, step: int = 0) -> Batch:
    """The batch of a step, in host memory."""
    grid, generator = setting.side // 16, torch.Generator().manual_seed(step)
    channels, width = model.config.in_channels, model.config.joint_attention_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sigma = torch.tensor([SIGMAS[step % len(SIGMAS)]])
    batch = Batch(
        clean=random(1, grid * grid, channels),
        noise=random(1, grid * grid, channels),
        sigma=sigma,
        prompt=[random(TEXT_TOKENS, width).to(dtype)],
        sigma_on_host=sigma,
        grid=(grid, grid),
        names=("",),
        counter=step,
    )
    return batch.map(lambda tensor: tensor.pin_memory()) if setting.device.type == "cuda" else batch


def loss_of(model: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The loss of a batch on the device."""
    takes_lists = isinstance(model, QwenImageTransformer2DModel | DiffSynthTransformer)
    loss: Tensor = flow_matching_loss(
        model if takes_lists else with_tensor_text(model),
        batch.clean,
        batch.noise,
        batch.sigma,
        torch.ones_like(batch.sigma),
        batch.prompt,
        batch.grid,
        dtype=dtype,
    ).mean()
    return loss


def modulated(table: ModulationRows | None, batch: Batch) -> AbstractContextManager[None]:
    """Within, the modulation is that of the batch."""
    return nullcontext() if table is None else table.of(batch.sigma_on_host)


def velocity_of(model: Any, setting: Setting, dtype: torch.dtype) -> Tensor:
    """The model's prediction."""
    batch = batch_of(model, setting, dtype).to(setting.device)
    velocity: Tensor = model(
        hidden_states=batch.noise.to(dtype),
        encoder_hidden_states=batch.prompt,
        timestep=batch.sigma,
        img_shapes=[[(1, *batch.grid)]],
        return_dict=False,
    )[0]
    return velocity


def gradients_of(
    model: Any, setting: Setting, dtype: torch.dtype, table: ModulationRows | None = None
) -> dict[str, Tensor]:
    """The LoRA's gradients of one step."""
    batch = batch_of(model, setting, dtype)
    with modulated(table, batch):
        loss_of(model, batch.to(setting.device), dtype).backward()
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    found = {name: parameter.grad for name, parameter in named}
    for _, parameter in named:
        parameter.grad = None
    return found


def measure_launched(
    setting: Setting,
    case: str,
    model: Any,
    optimizer: torch.optim.Optimizer,
    table: ModulationRows | None = None,
) -> None:
    """Median time of a step whose kernels are launched one by one, and the peak of memory."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    times, launched = [], []
    batches = [batch_of(model, setting, torch.bfloat16, step) for step in range(setting.steps + 1)]
    start(setting)
    for batch in batches:
        started = time.perf_counter()
        with modulated(table, batch):
            loss_of(model, batch.to(setting.device), torch.bfloat16).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        launched.append(time.perf_counter() - started)
        assert torch.isfinite(norm), "the gradient is not finite"
        optimizer.step()
        optimizer.zero_grad()
        wait(setting)
        times.append(time.perf_counter() - started)
    report(setting, case, times[1:])
    setting.note(setting.label(f"{case}, launching"), statistics.median(launched[1:]) * 1000, "ms/step")


def measure_recorded(
    setting: Setting, case: str, model: Any, table: ModulationRows | None, optimizer: torch.optim.Optimizer
) -> None:
    """The same with steps recorded as CUDA graphs; the peak includes the recording."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    graphs = StepGraphs(
        loss=lambda batch: loss_of(model, batch, torch.bfloat16),
        model=model,
        kept=lambda batch: model.pos_embed([(1, *batch.grid)], TEXT_TOKENS, setting.device),
        parameters=parameters,
        optimizer=optimizer,
        max_norm=1.0,
    )

    batches = [batch_of(model, setting, torch.bfloat16, step) for step in range(setting.steps + 4)]

    def take(batch: Batch) -> None:
        with modulated(table, batch):
            recorded = graphs.gradients(batch)
            if recorded is None:
                loss_of(model, batch.to(setting.device), torch.bfloat16).backward()
                optimizer.step()
                optimizer.zero_grad()
        if recorded is not None:
            assert torch.isfinite(recorded[1]), "the gradient is not finite"  # waits, as the trainer does
            graphs.update()

    times: list[float] = []
    start(setting)
    for batch in batches[:-1]:
        started = time.perf_counter()
        take(batch)
        wait(setting)
        times.append(time.perf_counter() - started)
    report(setting, case, times[3:])
    if setting.profile:
        print_kernels(case, lambda: take(batches[-1]))
    setting.note(setting.label(f"{case}, recording a step"), times[1], "s")
    setting.note(setting.label(f"{case}, memory reserved"), torch.cuda.max_memory_reserved() / GIB, "GiB")


def print_kernels(case: str, action: Callable[[], None], most: int = 40) -> None:
    """Print what the device did in `action`, by kernel: milliseconds, calls, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action()
        torch.cuda.synchronize()
    rows = [(event.self_device_time_total / 1000, event.count, event.key) for event in profile.key_averages()]
    rows.sort(reverse=True)
    print(f"{case}: {sum(row[0] for row in rows):.1f} ms in kernels", flush=True)
    for milliseconds, count, name in rows[:most]:
        print(f"  {milliseconds:8.2f} ms {count:6d} x {name[:120]}", flush=True)
    print_pauses(profile.events())


def print_pauses(events: Iterable[Any], least: float = 0.3) -> None:
    """Print when nothing was copied from host memory between the first and the last of the large copies.

    Args:
        events: of a profile.
        least: milliseconds of a pause that is listed, and of a copy that is large.
    """
    copies = [event.time_range for event in events if event.name.startswith("Memcpy HtoD")]
    large = sorted(
        (each.start / 1000, each.end / 1000) for each in copies if each.end - each.start > 1000 * least
    )
    if not large:
        return
    first, pauses = large[0][0], list(zip(large, large[1:], strict=False))
    found = [(end - first, start - end) for (_, end), (start, _) in pauses]
    print(
        f"  {len(large)} large copies in {large[-1][1] - first:.1f} ms, of which pauses "
        f"{sum(pause for _, pause in found):.1f} ms",
        flush=True,
    )
    listed = [f"{pause:.1f} at {moment:.0f}" for moment, pause in found if pause > least]
    print(f"  pauses: {', '.join(listed)}", flush=True)


def start(setting: Setting) -> None:
    """Before steps are measured."""
    release()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def report(setting: Setting, case: str, times: Sequence[float]) -> None:
    """A row with the median of `times` and the peak of memory."""
    peak = torch.cuda.max_memory_allocated() / GIB if setting.device.type == "cuda" else None
    setting.note(setting.label(case), statistics.median(times) * 1000, "ms/step", peak)


def report_error(setting: Setting, name: str, found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Distance of a gradient from the exact one."""
    case = f"LoRA gradient against fp32, relative error, {name}"
    setting.note(setting.label(case), relative(found, exact), "")


def wait(setting: Setting) -> None:
    """Let the device finish."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Give memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
