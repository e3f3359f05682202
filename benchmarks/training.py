"""A LoRA training step of the transformer at its true size, beside its peers over the same weights.

    python benchmarks/training.py [--cases stock resident ...] [--side 1024] [--results FILE]

Rank 32 on the README's twelve modules, one picture a step, random weights. A step is everything from noisy
latents to updated weights: forward, loss, backward, clipping, AdamW. The peers train bf16 factors with
gradient checkpointing, ours fp32 factors. Times are medians after warm-up; memory is the peak of the steps.
Cases of 60 blocks need an 80 GB GPU.

    embedded    LoRA gradients of the small trained model over bases in bf16 and in 8 bits, against fp32
    error       LoRA gradients of 4 blocks in bf16 against fp32: diffusers + PEFT, and ours
    stock       diffusers + PEFT, its kernels launched one by one
    diffsynth   DiffSynth-Studio's model class with its LoRA and checkpointing (the package diffsynth)
    resident    ours, base in bf16 on the device, steps recorded as CUDA graphs
    stream      ours within --vram_limit GB, base in bf16 from host memory
    fp8, int8   ours, base in 8 bits: one of the two in a run
    gradient    with stock and resident: their LoRA gradients compared
    trainer     with fp8: the whole trainer on the small model inside the package
    stream-fp8  the same within --vram_limit GB
    full        alone: the whole transformer with AdamW in the backward pass, states on the device and in host
                memory (28 GB of weights and states for 8 blocks)
"""

import argparse
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import RESULTS
from torch import Tensor
from training_full import measure_full
from training_peers import DiffSynthTransformer, add_stock_adapter, stock_of
from training_small import fill_factors, measure_embedded, measure_trainer, relative
from training_steps import (
    GIB,
    SIGMAS,
    Setting,
    build,
    gradients_of,
    measure_launched,
    measure_recorded,
    release,
    report_error,
    velocity_of,
    wait,
)

from diffusers_qwenimage.kernels import backend, set_backend
from diffusers_qwenimage.offload import pack_streamed, stream, unstream
from diffusers_qwenimage.quantize import quantize_
from diffusers_qwenimage.training.config import TrainConfig
from diffusers_qwenimage.training.memory import unit_bytes, weights_budget
from diffusers_qwenimage.training.modulation import ModulationRows
from diffusers_qwenimage.training.optimizers import make_optimizer
from diffusers_qwenimage.training.trained import add_adapter_, enable_checkpointing_

CASES = (
    *("embedded", "error", "stock", "diffsynth", "gradient", "resident", "stream", "fp8", "trainer"),
    *("stream-fp8", "int8", "full"),
)
MODES = ("full", "none", "selective")


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=CASES[:-1], help="what to measure (all but full)"
    )
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the transformer (60)")
    parser.add_argument("--side", type=int, default=1024, help="side of the picture in pixels (1024)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps (6)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of checkpointing (all)")
    parser.add_argument("--vram_limit", type=float, default=12.0, help="GB of the case stream (12)")
    parser.add_argument("--device", default="cuda", help="device (cuda)")
    parser.add_argument("--tiny", action="store_true", help="a tiny width, to try the script out")
    parser.add_argument("--backend", default="auto", help="of the kernels (auto)")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a recorded step as well")
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
        profile=args.profile,
    )
    print(f"fused path: {backend(setting.device).name}", flush=True)
    if "embedded" in args.cases:
        measure_embedded(setting.note)
    if "error" in args.cases:
        measure_error(setting)
    if "full" in args.cases:
        measure_full(setting)
    rest = [case for case in args.cases if case not in ("embedded", "error", "full")]
    if not rest:
        return
    release()
    model = build(setting, torch.bfloat16)
    gradient = measure_stock(setting, model, "gradient" in rest) if "stock" in rest else {}
    release()
    if "diffsynth" in rest:
        measure_diffsynth(setting, model)
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


def measure_diffsynth(setting: Setting, ours: Any) -> None:
    """DiffSynth-Studio's model class, LoRA and gradient checkpointing."""
    try:
        peer = DiffSynthTransformer(ours)
    except ValueError as error:
        print(error, flush=True)
        return
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)
    measure_launched(setting, "DiffSynth-Studio, checkpointing", peer, optimizer)


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
            measure_recorded(self.setting, case, self.model, self.table, optimizer)
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
    with torch.no_grad():
        before = velocity_of(ours.model, setting, torch.bfloat16)
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
    plan = stream(ours.model, device=setting.device, vram_limit=budget, on_call=(), split=False)
    copied = pack_streamed(ours.model) if plan.num_slots > 1 else plan.streamed_bytes
    release()
    setting.note(setting.label(f"{name}: placed in"), time.perf_counter() - started, "s")
    setting.note(setting.label(f"{name}: streamed twice a step"), plan.streamed_bytes / GIB, "GiB")
    setting.note(setting.label(f"{name}: copied twice a step"), copied / GIB, "GiB")
    with torch.no_grad():
        equal = torch.equal(before, velocity_of(ours.model, setting, torch.bfloat16))
    setting.note(
        setting.label(f"{name}: streamed equal to resident, bit for bit (1 = yes)"), float(equal), ""
    )
    ours.measure("full", f"{name} within {setting.vram_limit:g} GB")
    unstream(ours.model, device=setting.device)
    release()


def config_of(**changes: Any) -> TrainConfig:
    """A LoRA run's options."""
    return TrainConfig(dataset_base_path="", lora_base_model="dit", dtype="bfloat16", **changes)


if __name__ == "__main__":
    main()
