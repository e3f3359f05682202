"""What `training.py` measures on the small trained model inside the package, on a CPU or a GPU."""

import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_qwenimage.training.config import TrainConfig
from diffusers_qwenimage.training.data import inspect_rows
from diffusers_qwenimage.training.logs import read_log
from diffusers_qwenimage.training.metadata import read_rows
from diffusers_qwenimage.training.models import find_models
from diffusers_qwenimage.training.plan import Slot
from diffusers_qwenimage.training.stopping import StopSignal
from diffusers_qwenimage.training.trainer import Trainer, train


def measure_embedded(note: Callable[..., None]) -> None:
    """LoRA gradients of the small trained model over bases of several kinds, against fp32."""
    settings: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        **{kind: {"dtype": "bfloat16", "base_weights": kind} for kind in ("fp8", "int8", "fp8-storage")},
    }
    exact: dict[str, Tensor] = {}
    for name, changes in settings.items():
        with TemporaryDirectory() as place:
            found = gradients_of_embedded(Path(place), **changes)
        exact = exact or found
        case = f"LoRA gradient against fp32, relative error, small model on emoji of 256x256, base {name}"
        if name != "float32":
            note(case, relative(found, exact), "")


def measure_trainer(note: Callable[..., None]) -> None:
    """The whole trainer on four emoji with the small model inside the package, 64x64."""
    with TemporaryDirectory() as place:
        config = emoji_config(Path(place), lora_rank=8, height=64, width=64, max_steps=20)
        train(config)
        log = read_log(Path(config.output_path) / "log.csv")
    case = "trainer, small model, 4 emoji of 64x64, rank 8, batch 1"
    note(f"{case}, a step", statistics.median(record.seconds for record in log[-8:]) * 1000, "ms")
    note(f"{case}, loss of the first 4 steps", statistics.mean(r.loss for r in log[:4]), "")
    note(f"{case}, loss of the last 4 steps", statistics.mean(r.loss for r in log[-4:]), "")


def gradients_of_embedded(place: Path, **changes: Any) -> dict[str, Tensor]:
    """Gradients of the same eight samples, of a LoRA that has learned something."""
    config = emoji_config(place, height=256, width=256, batch_size=4, lora_rank=32, **changes)
    samples = inspect_rows(read_rows(config), config, progress=False)
    trainer = Trainer(config, Accelerator(mixed_precision="no"), find_models(config), samples, StopSignal())
    trainer.fill_cache()
    trainer.prepare()
    fill_factors(trainer.trained.modules["dit"])
    for start in (0, 4):
        slots = [Slot(index=i, counter=start + i) for i in range(4)]
        trainer.learner.loss(slots)[0].backward()
    return {name: p.grad for name, p in trainer.trained.parameters.items() if p.grad is not None}


def emoji_config(place: Path, **changes: Any) -> TrainConfig:
    """A LoRA run on four emoji with the small model inside the package."""
    folder = Path(__file__).parents[1] / "examples" / "datasets" / "emoji"
    rows = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()[:5]
    (place / "four.csv").write_text("\n".join(rows), encoding="utf-8")
    return TrainConfig(
        dataset_base_path=str(folder),
        dataset_metadata_path=str(place / "four.csv"),
        lora_base_model="dit",
        output_path=str(place / "run"),
        **changes,
    )


def fill_factors(model: Any) -> None:
    """Random factors of a LoRA that has learned something: the same values in every model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + parameter.shape[0])
            small = torch.randn(997, generator=generator).mul_(0.02).to(torch.bfloat16)
            repeats = -(-parameter.numel() // small.numel())
            flat = small.to(parameter.device).repeat(repeats)[: parameter.numel()]
            parameter.data.copy_(flat.view(parameter.shape))


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """||found - expected|| / ||expected|| over all weights."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    difference = sum(
        (found[name].float() - value.to(found[name].device).float()).square().sum().item()
        for name, value in expected.items()
    )
    total = sum(value.float().square().sum().item() for value in expected.values())
    return float((difference / total) ** 0.5)
