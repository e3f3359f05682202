"""A LoRA training step of the transformer at its true size, beside diffusers + PEFT over the same weights.

    python benchmarks/training.py [--cases stock resident ...] [--side 1024] [--results FILE]

Rank 32 on the README's twelve modules, one picture a step, random weights. A step is everything from noisy
latents to updated weights: forward, loss, backward, clipping, AdamW. "diffusers + PEFT" trains bf16 factors
with gradient checkpointing, ours fp32 factors. Times are medians after warm-up; memory is the peak of the
steps. Cases of 60 blocks need an 80 GB GPU.

    error     LoRA gradients of 4 blocks in bf16 against fp32: diffusers + PEFT, and ours
    stock     diffusers + PEFT
    resident  ours, base in bf16 on the device: full, selective and no checkpointing; table against weights
    fp8, int8 ours, base in 8 bits
    stream    ours within --vram_limit GB, base in bf16 from host memory; stream-fp8: in fp8
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from results import RESULTS, record
from torch import Tensor

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.kernels import backend, set_backend
from diffusers_qwenimage.training.config import LORA_TARGETS, TrainConfig
from diffusers_qwenimage.training.modulation import ModulationRows
from diffusers_qwenimage.training.objective import flow_matching_loss
from diffusers_qwenimage.training.optimizers import make_optimizer
from diffusers_qwenimage.training.trained import add_adapter_, enable_checkpointing_, place_base_

GIB = 2**30
CASES = ("error", "stock", "resident", "fp8", "int8", "stream", "stream-fp8")
SIGMAS = (0.9, 0.7, 0.5, 0.3)
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
        vram_limit=args.vram_limit,
        results=args.results,
    )
    print(f"fused path: {backend(setting.device).name}", flush=True)
    if "error" in args.cases:
        measure_error(setting)
    gradient = None
    if "stock" in args.cases or "resident" in args.cases:
        ours = build(setting, torch.bfloat16)
        gradient = measure_stock(setting, ours) if "stock" in args.cases else None
        if "resident" in args.cases:
            measure_resident(setting, ours, gradient)
        del ours
    for case in ("fp8", "int8", "stream", "stream-fp8"):
        if case in args.cases:
            release()
            measure_small(setting, case, gradient)


def measure_error(setting: Setting) -> None:
    """Gradients of a small stack of blocks in bf16 against the same in fp32."""
    small = Setting(**{**vars(setting), "blocks": min(4, setting.blocks), "side": min(512, setting.side)})
    ours = build(small, torch.bfloat16)
    stock = stock_of(ours)
    wide = stock_of(ours).float()
    for model in (stock, wide):
        add_stock_adapter(model, torch.bfloat16 if model is stock else torch.float32)
    exact = gradients_of(wide, small, torch.float32)
    del wide
    report_error(small, "diffusers + PEFT", gradients_of(stock, small, torch.bfloat16), exact)
    del stock
    config = config_of(gradient_checkpointing="none")
    add_adapter_(ours, config, torch.float32)
    fill_factors(ours)
    place_base_(ours, config, small.device, [(small.side, small.side)])
    for keep in ("all", "attention", "nothing"):
        for block in ours.transformer_blocks:
            block.keep = keep
        report_error(small, f"ours, keep {keep}", gradients_of(ours, small, torch.bfloat16), exact)


def measure_stock(setting: Setting, ours: Any) -> dict[str, Tensor]:
    """diffusers + PEFT with gradient checkpointing; returns its gradients."""
    stock = stock_of(ours)
    add_stock_adapter(stock, torch.bfloat16)
    stock.enable_gradient_checkpointing()
    gradient = {name: value.cpu() for name, value in gradients_of(stock, setting, torch.bfloat16).items()}
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-4)
    measure_steps(setting, "diffusers + PEFT, checkpointing", stock, optimizer)
    return gradient


def measure_resident(setting: Setting, ours: Any, gradient: dict[str, Tensor] | None) -> None:
    """Ours in bf16: the table, and three ways of checkpointing."""
    config = config_of(gradient_checkpointing="full", modulation_table=False)
    add_adapter_(ours, config, torch.float32)
    fill_factors(ours)
    sizes = [(setting.side, setting.side)]
    enable_checkpointing_(ours, config, sizes, setting.device)
    with torch.no_grad():
        before = velocity_of(ours, setting, torch.bfloat16)
    started = time.perf_counter()
    table = ModulationRows(ours, dtype=torch.bfloat16, device=setting.device)
    table.prepare(torch.tensor(SIGMAS))
    seconds = time.perf_counter() - started
    release()
    setting.note(setting.label(f"modulation of {len(SIGMAS)} timesteps tabulated"), seconds, "s")
    with torch.no_grad():
        equal = torch.equal(before, velocity_of(ours, setting, torch.bfloat16))
    setting.note(setting.label("table equal to weights, bit for bit (1 = yes)"), float(equal), "")
    optimizer = make_optimizer(config, [p for p in ours.parameters() if p.requires_grad])
    for mode in ("full", "selective", "none"):
        enable_checkpointing_(ours, config_of(gradient_checkpointing=mode), sizes, setting.device)
        if gradient is not None and mode == "full":
            found = gradients_of(ours, setting, torch.bfloat16)
            setting.note(
                setting.label("LoRA gradient, ours against diffusers + PEFT, relative difference"),
                relative(found, gradient),
                "",
            )
        measure_steps(setting, f"ours, bf16, checkpointing {mode}", ours, optimizer, table)


def measure_small(setting: Setting, case: str, gradient: dict[str, Tensor] | None) -> None:
    """Ours with the base in 8 bits, or streamed within a limit."""
    kind = "plain" if case == "stream" else case.removeprefix("stream-")
    limit = setting.vram_limit if case.startswith("stream") else None
    config = config_of(gradient_checkpointing="full", base_weights=kind, vram_limit=limit)
    ours = build(setting, torch.bfloat16)
    add_adapter_(ours, config, torch.float32)
    fill_factors(ours)
    if limit is not None:
        ours.to("cpu")
        release()
    sizes = [(setting.side, setting.side)]
    started = time.perf_counter()
    table = place_base_(ours, config, setting.device, sizes)
    release()
    setting.note(setting.label(f"{case}: placed in"), time.perf_counter() - started, "s")
    enable_checkpointing_(ours, config, sizes, setting.device)
    if limit is not None and setting.device.type == "cuda":
        total = torch.cuda.get_device_properties(setting.device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit * GIB / total)
    if gradient is not None:
        difference = relative(gradients_of(ours, setting, torch.bfloat16), gradient)
        setting.note(
            setting.label(f"LoRA gradient, ours {case} against diffusers + PEFT in bf16"), difference, ""
        )
    optimizer = make_optimizer(config, [p for p in ours.parameters() if p.requires_grad])
    name = f"ours, {kind.replace('plain', 'bf16')}, checkpointing full"
    measure_steps(setting, name if limit is None else f"{name}, within {limit:g} GB", ours, optimizer, table)
    if setting.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


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


def fill_factors(model: Any) -> None:
    """Random factors of a LoRA that has learned something: the same values in every model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + parameter.shape[0])
            small = torch.randn(997, generator=generator).mul_(0.02).to(torch.bfloat16)
            repeats = -(-parameter.numel() // small.numel())
            flat = small.to(parameter.device).repeat(repeats)[: parameter.numel()]
            parameter.data.copy_(flat.view(parameter.shape))


def config_of(**changes: Any) -> TrainConfig:
    """A LoRA run's options."""
    return TrainConfig(dataset_base_path="", lora_base_model="dit", dtype="bfloat16", **changes)


# --- measuring ---


def inputs_of(model: Any, setting: Setting, dtype: torch.dtype, step: int = 0) -> dict[str, Any]:
    """Clean latents, noise, sigma and text of a step."""
    grid, generator = setting.side // 16, torch.Generator().manual_seed(step)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sigma = torch.tensor([SIGMAS[step % len(SIGMAS)]])
    channels, width = model.config.in_channels, model.config.joint_attention_dim
    return {
        "clean": random(1, grid * grid, channels).to(setting.device),
        "noise": random(1, grid * grid, channels).to(setting.device),
        "sigma": sigma,
        "prompt": random(TEXT_TOKENS, width).to(setting.device, dtype),
        "grid": (grid, grid),
        "dtype": dtype,
    }


def loss_of(model: Any, setting: Setting, dtype: torch.dtype, step: int, table: Any = None) -> Tensor:
    """The loss of a step."""
    inputs = inputs_of(model, setting, dtype, step)
    sigma = inputs["sigma"]
    if table is not None:
        table.select(sigma)
    sigma = sigma.to(setting.device)
    stock = not isinstance(model, QwenImageTransformer2DModel)
    loss: Tensor = flow_matching_loss(
        _with_tensor_text(model) if stock else model,
        inputs["clean"],
        inputs["noise"],
        sigma,
        torch.ones_like(sigma),
        [inputs["prompt"]],
        inputs["grid"],
        dtype=dtype,
    ).mean()
    return loss


def _with_tensor_text(model: Any) -> Callable[..., Any]:
    """diffusers' forward, which takes the text as one tensor."""

    def call(*, encoder_hidden_states: Sequence[Tensor], **arguments: Any) -> Any:
        return model(encoder_hidden_states=torch.stack(list(encoder_hidden_states)), **arguments)

    return call


def velocity_of(model: Any, setting: Setting, dtype: torch.dtype) -> Tensor:
    """The model's prediction."""
    inputs = inputs_of(model, setting, dtype)
    velocity: Tensor = model(
        hidden_states=inputs["noise"].to(dtype),
        encoder_hidden_states=[inputs["prompt"]],
        timestep=inputs["sigma"].to(setting.device),
        img_shapes=[[(1, *inputs["grid"])]],
        return_dict=False,
    )[0]
    return velocity


def gradients_of(model: Any, setting: Setting, dtype: torch.dtype) -> dict[str, Tensor]:
    """The LoRA's gradients of one step."""
    loss_of(model, setting, dtype, 0).backward()
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    found = {name: parameter.grad for name, parameter in named}
    for _, parameter in named:
        parameter.grad = None
    return found  # type: ignore[return-value]


def measure_steps(
    setting: Setting, case: str, model: Any, optimizer: torch.optim.Optimizer, table: Any = None
) -> None:
    """Median time of a step, and the peak of memory."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    times, launched = [], []
    release()
    for step in range(setting.steps + 2):
        if step == 2 and setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss_of(model, setting, torch.bfloat16, step, table).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        launched.append(time.perf_counter() - started)
        assert torch.isfinite(norm), "the gradient is not finite"
        optimizer.step()
        optimizer.zero_grad()
        wait(setting)
        times.append(time.perf_counter() - started)
    optimizer.state.clear()
    peak = torch.cuda.max_memory_allocated() / GIB if setting.device.type == "cuda" else None
    setting.note(setting.label(case), statistics.median(times[2:]) * 1000, "ms/step", peak)
    setting.note(setting.label(f"{case}, launching"), statistics.median(launched[2:]) * 1000, "ms/step")


def report_error(setting: Setting, name: str, found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Distance of a gradient from the exact one."""
    case = f"LoRA gradient against fp32, relative error, {name}"
    setting.note(setting.label(case), relative(found, exact), "")


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """||found - expected|| / ||expected|| over all weights."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    difference = sum(
        (found[name].float() - value.to(found[name].device).float()).square().sum().item()
        for name, value in expected.items()
    )
    total = sum(value.float().square().sum().item() for value in expected.values())
    return float((difference / total) ** 0.5)


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
