"""What `training.py` measures of fine-tuning the whole transformer on one device."""

import statistics
import time
from functools import partial

import torch
from training_steps import GIB, Setting, batch_of, build, loss_of, release, start, wait

from diffusers_qwenimage.training.config import TrainConfig
from diffusers_qwenimage.training.host_states import HostStates
from diffusers_qwenimage.training.in_backward import StepsInBackward
from diffusers_qwenimage.training.optimizers import make_optimizer
from diffusers_qwenimage.training.trained import enable_checkpointing_


def measure_full(setting: Setting) -> None:
    """AdamW over bf16 weights, its step inside of the backward pass, with its states here and there."""
    for where in ("on the device", "in host memory"):
        on_host = HostStates(device=setting.device) if where == "in host memory" else None
        measure_states(setting, f"full fine-tuning, AdamW in the backward pass, states {where}", on_host)
        release()


def measure_states(setting: Setting, case: str, on_host: HostStates | None) -> None:
    """Median time of a step and the peak of memory, the first steps not counted."""
    config = TrainConfig(
        dataset_base_path="",
        trainable_models="dit",
        dtype="bfloat16",
        trainable_dtype="bfloat16",
        optimizer_in_backward=True,
        max_grad_norm=0.0,
        use_gradient_checkpointing=True,
    )
    model = build(setting, torch.bfloat16).requires_grad_(True).train()
    enable_checkpointing_(model, config, [(setting.side, setting.side)], setting.device)
    optimizer = StepsInBackward(list(model.parameters()), partial(make_optimizer, config), on_host)
    times: list[float] = []
    for step in range(setting.steps + 2):
        if step == 2:
            start(setting)
        started = time.perf_counter()
        loss_of(
            model, batch_of(model, setting, torch.bfloat16, step).to(setting.device), torch.bfloat16
        ).backward()
        assert torch.isfinite(optimizer.norm()), "the gradient is not finite"
        wait(setting)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB if setting.device.type == "cuda" else None
    label = f"{setting.side}x{setting.side}, {setting.blocks} blocks, {case}"
    setting.note(label, statistics.median(times[2:]) * 1000, "ms/step", peak)
    setting.note(f"{label}, first step", times[0], "s")
    optimizer.release()
    if on_host:
        on_host.settle()
        setting.note(f"{label}, streamed each way in a step", on_host.num_bytes / GIB, "GiB")
