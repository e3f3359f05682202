"""Training: LoRA and full fine-tuning with DiffSynth-Studio's flags, real batches, and exact resume.

from diffusers_qwenimage.training import TrainConfig, train

train(TrainConfig(dataset_base_path="data", lora_base_model="dit", output_path="out"))
"""

from importlib import import_module
from typing import Any

from .config import TrainConfig

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.trainer").train
