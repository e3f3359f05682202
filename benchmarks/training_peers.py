"""The peers of `training.py` over the weights that are measured: diffusers + PEFT, and DiffSynth-Studio.

DiffSynth-Studio (the package `diffsynth`) trains its own model class. Its modules are imported one by one,
since the package itself asks for libraries of pictures and sound that a step does not need; the loop over
blocks is that of its `model_fn_qwen_image` for one picture.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from training_small import fill_factors

from diffusers_qwenimage.training.config import LORA_TARGETS

RANK = 32


def stock_of(ours: Any) -> Any:
    """diffusers' transformer over the same weights."""
    config = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        stock = diffusers.QwenImageTransformer2DModel(**config).to(ours.dtype)
    # diffusers keeps its rotary tables as plain tensors: on the meta device they have no values.
    axes = list(ours.config.axes_dims_rope)
    stock.pos_embed = type(stock.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return over_weights_of(ours, stock)


def add_stock_adapter(stock: Any, dtype: torch.dtype) -> None:
    """The LoRA as PEFT adds it, its factors in `dtype`."""
    stock.add_adapter(lora_config())
    cast_trained_(stock, dtype)
    fill_factors(stock)


def with_tensor_text(model: Any) -> Callable[..., Any]:
    """diffusers' forward, which takes the text as one tensor."""

    def call(*, encoder_hidden_states: Sequence[Tensor], **arguments: Any) -> Any:
        return model(encoder_hidden_states=torch.stack(list(encoder_hidden_states)), **arguments)

    return call


class DiffSynthTransformer(nn.Module):
    """DiffSynth-Studio's transformer over the weights of ours, with its LoRA and checkpointing.

    Raises:
        ValueError: if ours has not the published width, the only one that its class knows, or if the package
            is missing.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.config = ours.config
        if ours.config.num_attention_heads * ours.config.attention_head_dim != 3072:
            raise ValueError("DiffSynth-Studio's class has a fixed width of 3072; leave --tiny out.")
        with torch.device("meta"):
            model = diffsynth_module("models.qwen_image_dit").QwenImageDiT(num_layers=ours.config.num_layers)
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
        model = over_weights_of(ours, model.to(ours.dtype))
        targets = LORA_TARGETS.split(",")
        self.model = inject_adapter_in_model(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), model
        )
        cast_trained_(self.model, ours.dtype)
        fill_factors(self.model)
        self._run = diffsynth_module("core.gradient.gradient_checkpoint").gradient_checkpoint_forward

    def forward(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Sequence[Tensor],
        timestep: Tensor,
        img_shapes: Sequence[Sequence[tuple[int, int, int]]],
        return_dict: bool,
    ) -> tuple[Tensor]:
        """Velocities [1, L, C] in a tuple; arguments as diffusers' forward has them."""
        model, text = self.model, torch.stack(list(encoder_hidden_states))
        lengths = [text.shape[1]] * len(text)
        image, text = model.img_in(hidden_states), model.txt_in(model.txt_norm(text))
        conditioning = model.time_text_embed(timestep.to(image.dtype), image.dtype)
        tables = model.pos_embed(list(img_shapes[0]), lengths, device=image.device)
        for block in model.transformer_blocks:
            text, image = self._run(
                block, True, False, image=image, text=text, temb=conditioning, image_rotary_emb=tables
            )
        return (model.proj_out(model.norm_out(image, conditioning)),)


def diffsynth_module(name: str) -> Any:
    """A module of DiffSynth-Studio, without what its packages import besides.

    Raises:
        ValueError: if the package is not installed.
    """
    spec = importlib.util.find_spec("diffsynth") if "diffsynth" not in sys.modules else None
    if spec is not None and spec.submodule_search_locations:
        (root,) = spec.submodule_search_locations
        for package in ("diffsynth", "diffsynth.models", "diffsynth.core", "diffsynth.core.gradient"):
            bare = ModuleType(package)
            bare.__path__ = [root + package.removeprefix("diffsynth").replace(".", "/")]
            sys.modules[package] = bare
    if "diffsynth" not in sys.modules:
        raise ValueError("DiffSynth-Studio is not installed: pip install --no-deps diffsynth einops.")
    return importlib.import_module(f"diffsynth.{name}")


def over_weights_of(ours: Any, model: Any) -> Any:
    """A model of the same layout over the same tensors, frozen, in training mode."""
    weights = {name: value.detach() for name, value in ours.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).train()


def cast_trained_(model: Any, dtype: torch.dtype) -> None:
    """Give trained weights a type."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def lora_config() -> LoraConfig:
    """Of all peers."""
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_TARGETS.split(","))
