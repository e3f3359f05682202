"""LoRA files made for the tests: canonical factors of a small model, spelled in any format."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusers_qwenimage.lora.formats import FORMATS, Format

MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.img_mlp.net.0.proj",
    "transformer_blocks.0.img_mlp.net.2",
    "transformer_blocks.0.img_mod.1",
    "transformer_blocks.1.txt_mod.1",
    "proj_out",
)


def format_named(name: str) -> Format:
    """The format of that name."""
    return next(format_ for format_ in FORMATS if format_.name == name)


def weight_shape(module: str, hidden: int = 48) -> tuple[int, int]:
    """(out, in) of a module in the small transformer of `components.py`."""
    sizes = {
        "img_mlp.net.0.proj": (4 * hidden, hidden),
        "img_mlp.net.2": (hidden, 4 * hidden),
        "img_mod.1": (6 * hidden, hidden),
        "txt_mod.1": (6 * hidden, hidden),
        "proj_out": (16, hidden),
    }
    return next((size for name, size in sizes.items() if module.endswith(name)), (hidden, hidden))


def factors(
    module: str, rank: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, hidden: int = 48
) -> tuple[Tensor, Tensor]:
    """(up [out, rank], down [rank, in]) with changes of the size that training makes."""
    out, width = weight_shape(module, hidden)
    generator = torch.Generator().manual_seed(seed * 1000 + len(module))
    up = torch.randn(out, rank, generator=generator) * 0.2
    down = torch.randn(rank, width, generator=generator) * width**-0.5
    return up.to(dtype), down.to(dtype)


def lora_tensors(
    format_name: str = "opensource",
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    modules: tuple[str, ...] = MODULES,
    hidden: int = 48,
) -> dict[str, Tensor]:
    """The tensors of a LoRA of these modules in a format; `alpha` None writes no alpha keys."""
    format_ = format_named(format_name)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        up, down = factors(module, rank, seed=seed, dtype=dtype, hidden=hidden)
        tensors[format_.render(module, "up")] = up
        tensors[format_.render(module, "down")] = down
        if alpha is not None:
            tensors[format_.render(module, "alpha")] = torch.tensor(float(alpha))
    return tensors


def write_lora(path: Path, format_name: str = "opensource", **settings: object) -> Path:
    """Write such a LoRA."""
    save_file(lora_tensors(format_name, **settings), path)  # type: ignore[arg-type]
    return path
