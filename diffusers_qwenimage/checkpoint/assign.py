"""Tensors of a checkpoint into a module: everything is checked before a byte of weight data is read."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .config import infer_config
from .reader import Checkpoint, from_tensors, quote
from .recognise import find_components, read_component
from .scaled import FLOAT8, ScaledCheckpoint, apply_scale, split_scales

COMPUTE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Module = TypeVar("Module", bound=nn.Module)


def empty_module(build: Callable[[], Module]) -> Module:
    """Call `build` so that parameters cost nothing: they are on the meta device. Buffers are real."""
    with init_empty_weights(include_buffers=False):
        return build()


def load_transformer_file(
    model_class: type[Module],
    source: str | Path | Mapping[str, Tensor],
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> Module:
    """A transformer of `model_class` from a safetensors file (or one of its shards, or a state dict).

    `config` is a config, or what `model_class.load_config` takes (a folder or Hub id, with `subfolder`).
    Without it, a `config.json` beside the file counts, then the shapes.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it holds something else, or does not fit the config.
    """
    loader: Any = model_class  # a ConfigMixin
    given: Mapping[str, Any] | None
    if isinstance(config, str | Path):
        given = loader.load_config(str(config), subfolder=subfolder)
    else:
        given = config
    if isinstance(source, Mapping):
        found = find_components(from_tensors(source))
        if "transformer" not in found:
            raise ValueError(f"The state dict holds the {' and '.join(found)}, but not the transformer.")
        part = found["transformer"]
        settings = dict(given) if given is not None else infer_config("transformer", part)
    else:
        settings, part = read_component(source, "transformer", config=given)
    model: Module = empty_module(lambda: loader.from_config(settings))
    assign_weights(model, part, dtype=dtype, device=device)
    return model.eval()


def assign_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
) -> None:
    """Give `module` (usually on the meta device) the weights of `checkpoint`, cast to `dtype`, on `device`.

    Without a cast and on the CPU the parameters are views of the memory-mapped file, so nothing is copied.
    `dtype` None keeps what is stored. Scaled fp8 weights are multiplied by their scales.

    Raises:
        ValueError: if keys are unknown or missing, shapes differ, or the file is quantised in an unknown way;
            the module is untouched then.
    """
    scaled = split_scales(checkpoint)
    check_fits(module, scaled.weights)
    state = dict(_read(scaled, dtype=dtype, device=torch.device(device)))
    for name, target in tied_names(module).items():
        state.setdefault(name, state[target])
    module.load_state_dict(state, strict=True, assign=True)
    if tied_names(module):
        module.tie_weights()  # type: ignore[operator]  # of PreTrainedModel
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:  # non-persistent ones, such as RoPE frequencies, keep their type
                owner._buffers[name] = buffer.to(device)


def read_weights(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The state dict of a checkpoint: scales applied, cast to `dtype` (None: as stored), on `device`."""
    return dict(_read(split_scales(checkpoint), dtype=dtype, device=torch.device(device)))


def _read(
    scaled: ScaledCheckpoint, *, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    if dtype is not None and dtype not in COMPUTE_TYPES:
        raise ValueError(
            f"Weights cannot be loaded as {dtype!r}; give one of {quote(COMPUTE_TYPES)}. (To store them "
            "in fp8, scales are needed: a plain cast loses small weights.)"
        )
    float8 = [name for name, stored in scaled.weights.tensors.items() if stored.entry.dtype in FLOAT8]
    if dtype is None and float8:
        raise ValueError(
            f"{scaled.weights.files[0]} holds fp8 weights, which cannot be computed with as they are; "
            "say which dtype to load them in, for instance dtype=torch.bfloat16."
        )
    factors = dict(Checkpoint(tensors=scaled.scales, metadata={}).read())
    for name, tensor in scaled.weights.read():
        moved = tensor.to(device)  # before the cast: fewer bytes to move, and the GPU casts faster
        if name in factors:
            moved = apply_scale(moved, factors[name].to(device), scaled.rotations.get(name, 0))
        yield name, moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved


def tied_names(module: nn.Module) -> dict[str, str]:
    """Parameter -> the parameter it shares, as transformers records them."""
    return getattr(module, "all_tied_weights_keys", None) or {}


def check_fits(module: nn.Module, weights: Checkpoint, *, optional: Collection[str] = ()) -> None:
    """Check that a checkpoint holds what the state dict of a module holds, but perhaps for `optional` names.

    Raises:
        ValueError: if keys are unknown or missing, or shapes differ.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict(keep_vars=True).items()}
    may_miss = {*tied_names(module), *optional}
    missing = [name for name in expected if name not in weights.tensors and name not in may_miss]
    unknown = [name for name in weights.tensors if name not in expected]
    wrong = [
        f"{name} {weights.shape(name)} instead of {expected[name]}"
        for name in weights.tensors
        if name in expected and weights.shape(name) != expected[name]
    ]
    problems = [
        f"{len(names)} {what} ({quote(names)})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"The tensors of {weights.files[0]} do not fit {type(module).__name__}: {'; '.join(problems)}. "
            "Check that all files of the component are given and that its config is the right one."
        )
