"""How far 8 bits are from the truth: layer by layer at the true width, and one forward of a whole model.

    python benchmarks/quantization.py [--device cpu] [--results FILE] [--cases layers embedded whole]

"layers": single linear layers at the widths of the published model, normal weights, inputs of which some
channels are up to 1000 times larger. "embedded": the checkpoint in the package, its own prompts, three noise
levels, against fp32. "whole": 60 blocks with random weights and inflated channels, against bf16; needs a GPU.
"Relative error" is ||got - exact|| / ||exact||.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from results import RESULTS, record
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from diffusers_qwenimage import QwenImagePipeline, QwenImageTransformer2DModel, default_checkpoint
from diffusers_qwenimage.kernels.rows import (
    FP8,
    LIMITS,
    Target,
    dequantize_reference,
    quantize_rows_reference,
)
from diffusers_qwenimage.quantize import KINDS, OUTSIDE_BLOCKS, SKIPPED, quantize_

WIDTH = 3072
NUM_TOKENS = 256
PROMPTS = ("two red circles above a blue square", "a large green triangle")
GROUPS = {
    "image q, k, v": ("to_q", "to_k", "to_v"),
    "text q, k, v": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "image attention output": ("to_out.0",),
    "text attention output": ("to_add_out",),
    "image MLP, first (img_mlp.net.0)": ("img_mlp.net.0.proj",),
    "image MLP, second (img_mlp.net.2)": ("img_mlp.net.2",),
    "text MLP, first": ("txt_mlp.net.0.proj",),
    "text MLP, second": ("txt_mlp.net.2",),
    "image modulation": ("img_mod.1",),
    "text modulation": ("txt_mod.1",),
}
Note = Callable[[str, float], None]


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = ("layers", "embedded", "whole")
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases[:2], help="what to measure")
    parser.add_argument("--device", default="cpu", help="device (cpu)")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of the whole model (60)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()

    def note(case: str, value: float) -> None:
        record("quantization", case, value, "", path=args.results)

    torch.manual_seed(0)
    with torch.no_grad():
        if "layers" in args.cases:
            measure_layers(args.device, note)
        if "embedded" in args.cases:
            measure_embedded(args.device, note)
        if "whole" in args.cases:
            measure_whole(random_model(args.device, args.blocks), note)


def measure_layers(device: str, note: Note) -> None:
    """One layer each of 3072 and of 12288 inputs, for inputs with ever larger channels."""
    for inputs, name in ((WIDTH, "after a norm"), (4 * WIDTH, "after GELU (net.2)")):
        weight = torch.randn(WIDTH, inputs, device=device) * 0.02
        for factor in (1, 20, 100, 1000):
            x = torch.randn(NUM_TOKENS, inputs, device=device)
            x[:, torch.randperm(inputs)[:8]] *= factor
            if inputs > WIDTH:
                x = gelu(x, approximate="tanh")
            exact = linear(x.double(), weight.double())
            for scheme, (got_x, got_weight) in schemes(x, weight).items():
                error = relative(linear(got_x.double(), got_weight.double()), exact)
                note(
                    f"layer of {inputs} inputs {name}, 8 channels x {factor}, {scheme}, relative error", error
                )


def schemes(x: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Scheme -> inputs and weight after a round trip."""

    def rows(values: Tensor, dtype: torch.dtype, rotation: int = 0) -> Tensor:
        quantized = quantize_rows_reference(values, Target(dtype, rotation))
        return dequantize_reference(*quantized, torch.float32, rotation)

    scale = x.abs().amax() / LIMITS[FP8]
    return {
        "fp8 (a scale per token)": (rows(x, FP8), rows(weight, FP8)),
        "fp8, one scale for all tokens": ((x / scale).to(FP8).float() * scale, rows(weight, FP8)),
        "fp8, rotated": (rows(x, FP8, 256), rows(weight, FP8, 256)),
        "fp8-storage": (x, rows(weight, FP8)),
        "int8 (rotated)": (rows(x, torch.int8, 256), rows(weight, torch.int8, 256)),
        "int8, not rotated": (rows(x, torch.int8), rows(weight, torch.int8)),
    }


def measure_embedded(device: str, note: Note) -> None:
    """The embedded checkpoint: every kind on all layers of the blocks, and on one group at a time."""
    pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), torch_dtype=torch.float32).to(device)
    inputs = list(inputs_of(pipe, device))
    exact = [pipe.transformer(**one).sample for one in inputs]

    def error(kind: str | None, only: tuple[str, ...] | None, skip: tuple[str, ...]) -> float:
        model = QwenImageTransformer2DModel.from_config(pipe.transformer.config).to(device)
        model.load_state_dict(pipe.transformer.state_dict())
        if kind is None:
            model.to(torch.bfloat16)
        elif only is None:
            quantize_(model, kind, skip=skip)
        else:
            names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
            others = [name for name in names if not name.endswith(tuple(f".{part}" for part in only))]
            quantize_(model, kind, skip=others)
        got = [model(**(bfloat16(one) if kind is None else one)).sample for one in inputs]
        return sum(map(relative, got, exact)) / len(exact)

    note("embedded checkpoint, forward, bf16, relative error", error(None, None, ()))
    for kind in KINDS:
        label = f"embedded checkpoint, forward, {kind}"
        note(f"{label}, all block layers but modulation, relative error", error(kind, None, SKIPPED))
        note(f"{label}, modulation too, relative error", error(kind, None, OUTSIDE_BLOCKS))
        without = (*SKIPPED, "img_mlp.net.2")
        note(f"{label}, without modulation and img_mlp.net.2, relative error", error(kind, None, without))
        for group, names in GROUPS.items():
            note(f"{label}, {group} alone, relative error", error(kind, names, ()))


def inputs_of(pipe: QwenImagePipeline, device: str) -> Iterator[dict[str, object]]:
    """Arguments of forwards at three noise levels for each prompt."""
    grid = 16
    for prompt, sigma in itertools.product(PROMPTS, (0.95, 0.6, 0.2)):
        text, mask = pipe.encode_prompt(prompt, device=torch.device(device))
        yield {
            "hidden_states": torch.randn(1, grid * grid, pipe.transformer.config.in_channels, device=device),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask,
            "timestep": torch.tensor([sigma], device=device),
            "img_shapes": [[(1, grid, grid)]],
        }


def random_model(device: str, blocks: int) -> QwenImageTransformer2DModel:
    """Blocks of the true size, N(0, 0.02), norms 1."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=blocks).to(torch.bfloat16)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


def measure_whole(exact: QwenImageTransformer2DModel, note: Note) -> None:
    """A bf16 model whose norms get 8 channels that are 20 to 100 times larger, and its 8-bit forms."""
    device, width, side = exact.device, exact.inner_dim, 32
    biases = [part[1].bias for block in exact.transformer_blocks for part in (block.img_mod, block.txt_mod)]
    before = [bias.data for bias in biases]
    for bias in biases:
        bias.data = bias.data.clone()
        for part in (1, 4):  # the two scales of a modulation
            channels = part * width + torch.randperm(width, device=device)[:8]
            bias.data[channels] = torch.linspace(20, 100, 8, device=device).to(bias.dtype)
    inputs = {
        "hidden_states": torch.randn(1, side * side, 64, device=device, dtype=exact.dtype),
        "encoder_hidden_states": torch.randn(1, 128, 3584, device=device, dtype=exact.dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=exact.dtype),
        "img_shapes": [[(1, side, side)]],
    }
    expected = exact(**inputs).sample
    for kind in KINDS:
        with torch.device("meta"):
            model = QwenImageTransformer2DModel.from_config(exact.config)
        model.load_state_dict(exact.state_dict(), assign=True)
        quantize_(model.eval().requires_grad_(False), kind)
        label = f"{len(biases) // 2} blocks, random weights, 8 channels x 20 to 100, {kind} against bf16"
        note(f"{label}, relative difference", relative(model(**inputs).sample, expected))
    for bias, data in zip(biases, before, strict=True):
        bias.data = data


def bfloat16(inputs: dict[str, object]) -> dict[str, object]:
    """The tensors of the arguments that are floating, in bf16."""
    return {
        key: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def relative(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


if __name__ == "__main__":
    main()
