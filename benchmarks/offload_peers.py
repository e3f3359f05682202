"""The peers of `offload.py` over the same weights: DiffSynth-Studio's CPU offload, diffusers' group offload.

Both run the branches of the guidance one after the other, as their pipelines do, and compute the modulation
in every step.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from offload_model import (
    GIB,
    Setting,
    config_of,
    empty_cache,
    inputs_of,
    peaks,
    pinned_in_place,
    reset_peak,
    resident_memory,
    timed,
)
from torch import Tensor, nn
from training_peers import diffsynth_module

Note = Callable[..., None]


def measure_peers(names: Sequence[str], weights: dict[str, Tensor], setting: Setting, note: Note) -> None:
    """Some of `PEERS`, over the tensors of ours, by name, in host memory."""
    for name in names:
        empty_cache(setting.device)
        try:
            PEERS[name](weights, setting, note)
        except (ValueError, RuntimeError) as error:
            print(f"{name}: {error}")


def measure_diffsynth(weights: dict[str, Tensor], setting: Setting, note: Note) -> None:
    """Its transformer with everything in host memory and `vram_limit=0`; one step, since it takes long.

    Raises:
        ValueError: if the package is not installed, or the model has not the published width.
    """
    if setting.width != 24:
        raise ValueError("DiffSynth-Studio's class has a fixed width of 3072.")
    module = diffsynth_module("models.qwen_image_dit")
    with torch.device("meta"):
        peer = module.QwenImageDiT(num_layers=setting.blocks).to(torch.bfloat16)
    peer.pos_embed = type(peer.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    peer.load_state_dict(weights, assign=True)
    layers = importlib.import_module("diffsynth.core.vram.layers")
    wrappers = {
        module.RMSNorm: layers.AutoWrappedModule,
        nn.Linear: layers.AutoWrappedLinear,
        nn.Embedding: layers.AutoWrappedModule,
    }
    places = {"offload": "cpu", "onload": "cpu", "preparing": setting.device, "computation": setting.device}
    settings = {f"{stage}_dtype": torch.bfloat16 for stage in places}
    settings |= {f"{stage}_device": torch.device(place) for stage, place in places.items()}
    peer = layers.enable_vram_management(peer, wrappers, settings, vram_limit=0)
    for layer in peer.modules():
        if isinstance(layer, layers.AutoTorchModule):
            layer.onload()
    image, text, timestep, shapes = inputs_of(setting)

    @torch.no_grad()
    def step() -> Tensor:
        return torch.cat(
            [velocity(peer, image[:1], tokens[None], timestep[:1], shapes[0]) for tokens in text]
        )

    measure("DiffSynth CPU offload", step, setting, note, warm=False)


def velocity(peer: Any, image: Tensor, text: Tensor, timestep: Tensor, shapes: list[Any]) -> Tensor:
    """One forward as DiffSynth-Studio's `model_fn_qwen_image` makes it."""
    image, text_lengths = peer.img_in(image), [text.shape[1]]
    conditioning = peer.time_text_embed(timestep, image.dtype)
    text = peer.txt_in(peer.txt_norm(text))
    tables = peer.pos_embed(shapes, text_lengths, device=image.device)
    for block in peer.transformer_blocks:
        text, image = block(image=image, text=text, temb=conditioning, image_rotary_emb=tables)
    result: Tensor = peer.proj_out(peer.norm_out(image, conditioning))
    return result


def measure_group_offload(weights: dict[str, Tensor], setting: Setting, note: Note) -> None:
    """diffusers' model: one block per group, a stream, events of the allocator.

    Its weights are pinned beforehand, since it would pin them one by one for most of a minute.
    """
    device = setting.device
    with torch.device("meta"):
        stock = diffusers.QwenImageTransformer2DModel(**config_of(setting)).to(torch.bfloat16)
    stock.pos_embed = type(stock.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    stock.load_state_dict(weights, assign=True)
    stock.eval().requires_grad_(False)
    image, text, timestep, shapes = inputs_of(setting)

    @torch.no_grad()
    def step() -> Tensor:
        velocities = [
            stock(
                hidden_states=image[:1],
                encoder_hidden_states=sample[None],
                timestep=timestep[:1],
                img_shapes=shapes[:1],
                return_dict=False,
            )[0]
            for sample in text
        ]
        return torch.cat(velocities)

    with pinned_in_place(stock, device):
        start = time.perf_counter()
        stock.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            record_stream=device.type == "cuda",
        )
        seconds = time.perf_counter() - start
        note("diffusers group_offload, placing weights that are pinned already", seconds, "s")
        note("diffusers group_offload, host memory of the process", resident_memory(), "GiB")
        measure("diffusers group_offload", step, setting, note, warm=True)


def measure(name: str, step: Callable[[], Tensor], setting: Setting, note: Note, *, warm: bool) -> None:
    """Time and peak of a step."""
    reset_peak(setting.device)
    if warm:
        step()
    milliseconds = timed(step, setting.device, 1)
    note(f"{name}, step", milliseconds, "ms", peaks(setting.device)[0] / GIB)


PEERS = {"diffsynth": measure_diffsynth, "group_offload": measure_group_offload}
