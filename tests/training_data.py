"""Datasets, options and trainers for the tests of training."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from components import random
from PIL import Image

from diffusers_qwenimage.training.config import TrainConfig
from diffusers_qwenimage.training.data import inspect_rows
from diffusers_qwenimage.training.metadata import read_rows
from diffusers_qwenimage.training.models import find_models
from diffusers_qwenimage.training.options import make_config
from diffusers_qwenimage.training.stopping import StopSignal
from diffusers_qwenimage.training.trainer import Trainer

# As in the README's step 2.
MODEL = (
    "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,"
    "Qwen/Qwen-Image:text_encoder/model*.safetensors,"
    "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
)
TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)


def write_dataset(folder: Path, *, num: int, size: tuple[int, int], seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rows = [("image", "prompt")]
    for index in range(num):
        random_picture(size, seed + index).save(folder / f"{index}.png")
        rows.append((f"{index}.png", f"a picture, number {index}"))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def random_picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random picture of (width, height)."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def options(**changes: Any) -> dict[str, Any]:
    """Options of a short LoRA run in fp32 in the working directory."""
    values: dict[str, Any] = {
        "dataset_base_path": "data",
        "model_id_with_origin_paths": MODEL,
        "output_path": "out",
        "dtype": "float32",
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-2,
        **changes,
    }
    if "trainable_models" in changes:
        del values["lora_base_model"]
    return values


def config(**changes: Any) -> TrainConfig:
    return make_config(options(**changes))


def arguments(**changes: Any) -> list[str]:
    """The same as a command line."""
    line = []
    for name, value in options(**changes).items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def open_trainer(settings: TrainConfig) -> Trainer:
    """A trainer that has loaded no model yet."""
    samples = inspect_rows(read_rows(settings), settings, progress=False)
    return Trainer(settings, Accelerator(mixed_precision="no"), find_models(settings), samples, StopSignal())


def make_trainer(**changes: Any) -> Trainer:
    """A trainer before its first step. B of a LoRA is random: as 0 it would leave A without a gradient."""
    trainer = open_trainer(config(**changes))
    trainer.fill_cache()
    trainer.prepare()
    torch.manual_seed(3)
    for name, parameter in trainer.trained.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer


@torch.no_grad()
def predict(transformer: Any) -> torch.Tensor:
    """A velocity of the tiny transformer."""
    velocity: torch.Tensor = transformer.eval()(
        hidden_states=random(1, 6, 64),
        encoder_hidden_states=random(1, 5, 16, seed=1),
        encoder_hidden_states_mask=None,
        timestep=torch.tensor([0.7]),
        img_shapes=[[(1, 2, 3)]],
        return_dict=False,
    )[0]
    return velocity
