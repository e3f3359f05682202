"""The transformers that `transformer.py` measures, over one set of random weights, and their arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_peers import stock_of

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.projections import fuse_

TEXT_TOKENS = 128


def build(blocks: int, device: str, heads: int = 24) -> tuple[QwenImageTransformer2DModel, torch.nn.Module]:
    """Our transformer and diffusers' over one set of random weights, N(0, 0.02), norms 1."""
    with torch.device("meta"):
        ours = QwenImageTransformer2DModel(num_layers=blocks, num_attention_heads=heads).to(torch.bfloat16)
    ours.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in ours.named_parameters():
        if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    fuse_(ours.eval().requires_grad_(False))  # before sharing, so that the weights are on the device once
    return ours, stock_of(ours).eval()


def over_the_same(ours: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    """Another model of our class over the same tensors."""
    with torch.device("meta"):
        other = QwenImageTransformer2DModel.from_config(ours.config)
    other.load_state_dict(ours.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def inputs_of(ours: torch.nn.Module, side: int, batch: int = 1) -> dict[str, object]:
    """Arguments of a forward for a picture of `side` x `side` pixels."""
    device, dtype = ours.device, ours.dtype
    grid = side // 16
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    return {
        "hidden_states": random(batch, grid * grid, 64),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, 3584),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, grid, grid)]] * batch,
        "return_dict": False,
    }


def guidance_inputs(ours: torch.nn.Module, side: int) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments of the packed forward of both branches, and of the negative branch alone (10 tokens)."""
    one = inputs_of(ours, side)
    negative = one["encoder_hidden_states"][:, :10]  # type: ignore[index]
    packed = {
        **one,
        "hidden_states": torch.cat([one["hidden_states"]] * 2),  # type: ignore[list-item]
        "encoder_hidden_states": [one["encoder_hidden_states"][0], negative[0]],  # type: ignore[index]
        "timestep": one["timestep"].expand(2),  # type: ignore[attr-defined]
        "img_shapes": one["img_shapes"] * 2,  # type: ignore[operator]
    }
    return packed, {**one, "encoder_hidden_states": negative}


def with_table(model: torch.nn.Module, inputs: dict[str, object]) -> Callable[[], object]:
    """A forward whose modulation was tabulated before, as in the pipelines; all samples at one timestep."""
    sigma = inputs["timestep"][:1]  # type: ignore[index]
    table = model.tabulate_modulation(sigma, dtype=torch.bfloat16)  # type: ignore[operator]
    return lambda: model(**inputs, modulation=table.at(0))


def plain(ours: torch.nn.Module, inputs: dict[str, object]) -> Callable[[], object]:
    """A call that takes the plain path."""

    def call() -> object:
        with use_backend("off"):
            return ours(**inputs)

    return call


@torch.no_grad()
def profile(ours: torch.nn.Module, side: int, path: Path) -> None:
    """Write the kernels of one forward (modulation tabulated), longest first."""
    forward = with_table(ours, inputs_of(ours, side))
    forward()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        forward()
        torch.cuda.synchronize()
    table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90)
    path.write_text(table, encoding="utf-8")
    print(table)


def recorded(forward: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any] | None:
    """The forward as a CUDA graph, as pipelines run it where launching takes the time, and its result.

    None without a GPU.
    """
    if not torch.cuda.is_available():
        return None
    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()
    return graph, result
