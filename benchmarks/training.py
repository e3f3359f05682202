"""A LoRA training step of the transformer at its true size, beside diffusers + PEFT over the same weights.

    python benchmarks/training.py [--cases stock resident ...] [--side 1024] [--results FILE]

Rank 32 on the README's twelve modules, one picture a step, random weights. A step is everything from noisy
latents to updated weights: forward, loss, backward, clipping, AdamW. "diffusers + PEFT" trains bf16 factors
with gradient checkpointing, ours fp32 factors. Times are medians after warm-up; memory is the peak of the
steps. Cases of 60 blocks need an 80 GB GPU.

    embedded    LoRA gradients of the small trained model over bases in bf16 and in 8 bits, against fp32
    error       LoRA gradients of 4 blocks in bf16 against fp32: diffusers + PEFT, and ours
    stock       diffusers + PEFT, its kernels launched one by one
    resident    ours, base in bf16 on the device, steps recorded as CUDA graphs
    stream      ours within --vram_limit GB, base in bf16 from host memory; the model then stays streamed
    fp8, int8   ours, base in 8 bits: one of the two in a run
    gradient    with stock and resident: their LoRA gradients compared
    trainer     with fp8: the whole trainer on the small model inside the package
    stream-fp8  the same within --vram_limit GB
"""

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from results import RESULTS, record
from torch import Tensor
from training_small import fill_factors, measure_embedded, measure_trainer, relative

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.kernels import backend, set_backend
from diffusers_qwenimage.offload import stream
from diffusers_qwenimage.quantize import quantize_
from diffusers_qwenimage.training.batch import Batch
from diffusers_qwenimage.training.config import LORA_TARGETS, TrainConfig
from diffusers_qwenimage.training.graphs import StepGraphs
from diffusers_qwenimage.training.memory import unit_bytes, weights_budget
from diffusers_qwenimage.training.modulation import ModulationRows
from diffusers_qwenimage.training.objective import flow_matching_loss
from diffusers_qwenimage.training.optimizers import make_optimizer
from diffusers_qwenimage.training.trained import add_adapter_, enable_checkpointing_

GIB = 2**30
CASES = (
    "embedded",
    "error",
    "stock",
    "gradient",
    "resident",
    "stream",
    "fp8",
    "trainer",
    "stream-fp8",
    "int8",
)
MODES = ("full", "none", "selective")
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

    def note(self, case: str, value: float, unit: str, peak: float | None = None) -> None:
        """A row of the table."""
        record("training", case, value, unit, peak_memory_gib=peak, path=self.results)

    def label(self, case: str) -> str:
        """The case with the picture's size."""
        return f"{self.side}x{self.side}, rank 32, {self.blocks} blocks, {case}"


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="what to measure (all)")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels (1024)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps (6)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of checkpointing (all)")
    parser.add_argument("--vram_limit", type=float, default=12.0, help="GB of the case stream (12)")
    parser.add_argument("--device", default="cuda", help="device (cuda)")
    parser.add_argument("--tiny", action="store_true", help="a tiny width, to try the script out")
    parser.add_argument("--backend", default="auto", help="of the kernels (auto)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    set_backend(args.backend)
    setting = Setting(
        device=torch.device(args.device),
        side=args.side,
        blocks=args.blocks,
        tiny=args.tiny,
        steps=args.steps,
        modes=tuple(args.modes),
        vram_limit=args.vram_limit,
        results=args.results,
    )
    print(f"fused path: {backend(setting.device).name}", flush=True)
    if "embedded" in args.cases:
        measure_embedded(setting.note)
    if "error" in args.cases:
        measure_error(setting)
    rest = [case for case in args.cases if case not in ("embedded", "error")]
    if not rest:
        return
    release()
    model = build(setting, torch.bfloat16)
    gradient = measure_stock(setting, model, "gradient" in rest) if "stock" in rest else {}
    release()
    ours = Ours(setting, model)
    if "resident" in rest:
        measure_resident(setting, ours, gradient)
    if "stream" in rest:
        measure_streamed(setting, ours, "bf16")
    for kind in ("fp8", "int8"):
        if kind in rest:
            measure_eight_bits(setting, ours, kind)
        if kind == "fp8" and "trainer" in rest:
            try:
                measure_trainer(setting.note)
            except RuntimeError:  # what CUDA raises; the other cases have nothing to do with it
                traceback.print_exc()
        if f"stream-{kind}" in rest:
            measure_streamed(setting, ours, kind)


def measure_error(setting: Setting) -> None:
    """Gradients of a small stack of blocks in bf16 against the same in fp32."""
    small = replace(setting, blocks=min(4, setting.blocks), side=min(512, setting.side))
    ours = build(small, torch.bfloat16)
    stock = stock_of(ours)
    wide = stock_of(ours).float()
    for model in (stock, wide):
        add_stock_adapter(model, torch.bfloat16 if model is stock else torch.float32)
    exact = gradients_of(wide, small, torch.float32)
    del wide
    report_error(small, "diffusers + PEFT", gradients_of(stock, small, torch.bfloat16), exact)
    del stock
    add_adapter_(ours, config_of(), torch.float32)
    fill_factors(ours)
    for keep in ("all", "attention", "nothing"):
        for block in ours.transformer_blocks:
            block.keep = keep
        report_error(small, f"ours, keep {keep}", gradients_of(ours, small, torch.bfloat16), exact)


def measure_stock(setting: Setting, ours: Any, wants_gradient: bool) -> dict[str, Tensor]:
    """diffusers + PEFT with gradient checkpointing; returns its gradients if they are wanted."""
    stock = stock_of(ours)
    add_stock_adapter(stock, torch.bfloat16)
    stock.enable_gradient_checkpointing()
    found = gradients_of(stock, setting, torch.bfloat16) if wants_gradient else {}
    gradient = {name: value.cpu() for name, value in found.items()}
    del found
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-4)
    measure_launched(setting, "diffusers + PEFT, checkpointing", stock, optimizer)
    return gradient


class Ours:
    """Our model with its adapter, at first in bf16 on the device."""

    def __init__(self, setting: Setting, model: Any) -> None:
        self.setting = setting
        self.model = model
        self.table: ModulationRows | None = None
        self.gradient: dict[str, Tensor] = {}
        add_adapter_(model, config_of(), torch.float32)
        fill_factors(model)

    def tabulate(self) -> None:
        """Replace the modulation by its table, and compare."""
        setting = self.setting
        with torch.no_grad():
            before = velocity_of(self.model, setting, torch.bfloat16)
        wait(setting)
        started = time.perf_counter()
        self.table = ModulationRows(self.model, dtype=torch.bfloat16, device=setting.device)
        self.table.prepare(torch.tensor(SIGMAS))
        self.table.drop_weights()
        release()
        seconds = time.perf_counter() - started
        setting.note(setting.label(f"modulation of {len(SIGMAS)} timesteps tabulated"), seconds, "s")
        with torch.no_grad():
            equal = torch.equal(before, velocity_of(self.model, setting, torch.bfloat16))
        setting.note(setting.label("table equal to weights, bit for bit (1 = yes)"), float(equal), "")

    def compare(self, name: str, expected: dict[str, Tensor]) -> None:
        """Distance of the gradient from another one."""
        found = gradients_of(self.model, self.setting, torch.bfloat16, self.table)
        if not self.gradient:
            self.gradient = {key: value.cpu() for key, value in found.items()}
        if expected:
            self.setting.note(self.setting.label(name), relative(found, expected), "")

    def checkpoint(self, mode: str) -> TrainConfig:
        """Choose what blocks keep."""
        config = config_of(gradient_checkpointing=mode)
        sizes = [(self.setting.side, self.setting.side)]
        enable_checkpointing_(self.model, config, sizes, self.setting.device)
        return config

    def measure(self, mode: str, name: str) -> None:
        """Time and memory of steps with one way of checkpointing."""
        config = self.checkpoint(mode)
        optimizer = make_optimizer(config, [p for p in self.model.parameters() if p.requires_grad])
        case = f"ours, {name}, checkpointing {mode}"
        if self.setting.device.type == "cuda":
            measure_recorded(self.setting, case, self, optimizer)
        else:
            measure_launched(self.setting, case, self.model, optimizer, self.table)


def measure_resident(setting: Setting, ours: Ours, gradient: dict[str, Tensor]) -> None:
    """Ours in bf16: the table, and three ways of checkpointing."""
    ours.checkpoint("full")
    ours.tabulate()
    if gradient:
        ours.compare("LoRA gradient, ours against diffusers + PEFT, relative difference", gradient)
    for mode in setting.modes:
        ours.measure(mode, "bf16")


def measure_eight_bits(setting: Setting, ours: Ours, kind: str) -> None:
    """Ours with the base in 8 bits."""
    ours.checkpoint("full")
    if ours.table is None:
        ours.tabulate()
    quantize_(ours.model, kind)
    release()
    ours.measure("full", kind)


def measure_streamed(setting: Setting, ours: Ours, name: str) -> None:
    """Ours within a limit: the base streamed from host memory."""
    config = ours.checkpoint("full")
    if ours.table is None:
        ours.tabulate()
    parameters = [p for p in ours.model.parameters() if p.requires_grad]
    budget = weights_budget(
        int(setting.vram_limit * GIB),
        mode=config.checkpointing,
        num_blocks=setting.blocks,
        unit=unit_bytes(ours.model, [(setting.side, setting.side)], 1, torch.bfloat16),
        trained_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )
    set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_allocator is not None and setting.device.type == "cuda":  # as PYTORCH_CUDA_ALLOC_CONF does
        set_allocator("expandable_segments:True")
    started = time.perf_counter()
    plan = stream(ours.model, device=setting.device, vram_limit=budget, on_call=())
    release()
    setting.note(setting.label(f"{name}: placed in"), time.perf_counter() - started, "s")
    setting.note(setting.label(f"{name}: streamed twice a step"), plan.streamed_bytes / GIB, "GiB")
    ours.measure("full", f"{name} within {setting.vram_limit:g} GB")


# --- models ---


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


def stock_of(ours: Any) -> Any:
    """diffusers' transformer over the same weights."""
    config = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        stock = diffusers.QwenImageTransformer2DModel(**config).to(ours.dtype)
    # diffusers keeps its rotary tables as plain tensors: on the meta device they have no values.
    axes = list(ours.config.axes_dims_rope)
    stock.pos_embed = type(stock.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    weights = {name: value.detach() for name, value in ours.state_dict().items()}
    stock.load_state_dict(weights, assign=True)
    return stock.requires_grad_(False).train()


def add_stock_adapter(stock: Any, dtype: torch.dtype) -> None:
    """The LoRA as PEFT adds it, its factors in `dtype`."""
    stock.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=LORA_TARGETS.split(",")))
    for parameter in stock.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fill_factors(stock)


def config_of(**changes: Any) -> TrainConfig:
    """A LoRA run's options."""
    return TrainConfig(dataset_base_path="", lora_base_model="dit", dtype="bfloat16", **changes)


# --- measuring ---


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
    stock = not isinstance(model, QwenImageTransformer2DModel)
    loss: Tensor = flow_matching_loss(
        _with_tensor_text(model) if stock else model,
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


def _with_tensor_text(model: Any) -> Callable[..., Any]:
    """diffusers' forward, which takes the text as one tensor."""

    def call(*, encoder_hidden_states: Sequence[Tensor], **arguments: Any) -> Any:
        return model(encoder_hidden_states=torch.stack(list(encoder_hidden_states)), **arguments)

    return call


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
    return found  # type: ignore[return-value]


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
    start(setting)
    for step in range(setting.steps + 1):
        started = time.perf_counter()
        batch = batch_of(model, setting, torch.bfloat16, step)
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


def measure_recorded(setting: Setting, case: str, ours: Ours, optimizer: torch.optim.Optimizer) -> None:
    """The same with steps recorded as CUDA graphs; the peak includes the recording."""
    parameters = [parameter for parameter in ours.model.parameters() if parameter.requires_grad]
    graphs = StepGraphs(
        loss=lambda batch: loss_of(ours.model, batch, torch.bfloat16),
        model=ours.model,
        kept=lambda batch: ours.model.pos_embed([(1, *batch.grid)], TEXT_TOKENS, setting.device),
        parameters=parameters,
        optimizer=optimizer,
        max_norm=1.0,
    )
    times: list[float] = []
    start(setting)
    for step in range(setting.steps + 3):
        started = time.perf_counter()
        batch = batch_of(ours.model, setting, torch.bfloat16, step)
        with modulated(ours.table, batch):
            recorded = graphs.gradients(batch)
            if recorded is None:
                loss_of(ours.model, batch.to(setting.device), torch.bfloat16).backward()
                optimizer.step()
                optimizer.zero_grad()
        if recorded is not None:
            assert torch.isfinite(recorded[1]), "the gradient is not finite"  # waits, as the trainer does
            graphs.update()
        wait(setting)
        times.append(time.perf_counter() - started)
    report(setting, case, times[3:])
    setting.note(setting.label(f"{case}, recording a step"), times[1], "s")
    setting.note(setting.label(f"{case}, memory reserved"), torch.cuda.max_memory_reserved() / GIB, "GiB")


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


if __name__ == "__main__":
    main()
