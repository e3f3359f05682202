"""Trainer states on the disk: complete or absent, verified, the newest kept.

A state is a folder `step-N.state` beside the weights `step-N.safetensors`: `trained.safetensors` (trained
weights in their own type, and their moving average), `optimizer.safetensors`, `state.json` (everything else).
It is written as `.step-N.state.partial`, every file synced and read back, and then renamed; older states go
only after that.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusers_qwenimage.files import read_header, sync, write_safetensors, write_text

from .config import TrainConfig

STATE_NAME = re.compile(r"step-(\d+)\.state")
PARTIAL = re.compile(r"\.step-\d+\.state\.(partial|old)")
TRAINED, OPTIMIZER, VALUES = "trained.safetensors", "optimizer.safetensors", "state.json"
FREE_MARGIN = 1 << 20  # bytes that must stay free beside a checkpoint


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on exactly.

    Attributes:
        step: optimizer steps done.
        trained: trained weights by name; moving averages as `ema.NAME`.
        optimizer: the optimizer's `state_dict`.
        values: numbers and texts: options, data, guard.
        folder: where it was read from.
    """

    step: int
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    values: Mapping[str, Any]
    folder: Path | None = None


def find_start(config: TrainConfig, output: Path) -> Path | None:
    """The state to resume from; refuses to write over an earlier run.

    Raises:
        ValueError: if there is none, or a newer one that was not asked for.
    """
    if config.resume_from is not None:
        found = find_state(output, config.resume_from)
        states = list_states(output)
        if states and config.resume_from != "latest" and found.resolve() != states[-1][1].resolve():
            raise ValueError(
                f"{output} holds {states[-1][1].name}, which going on from {found} would leave behind: "
                "resume from latest, or give another output_path."
            )
        return found
    if list_states(output):
        raise ValueError(
            f"{output} holds checkpoints of an earlier run. Pass --resume_from latest to go on with it, or "
            "another output_path."
        )
    remove_partial(output)
    return None


def save_state(output: Path, state: State, *, keep: int, beside: Path | None = None) -> Path:
    """Write a state and remove all but the newest `keep`; returns its folder.

    Args:
        output: of the run.
        state: what to write.
        keep: how many states stay.
        beside: a folder of `output` that becomes part of the state.

    Raises:
        OSError: if it cannot be written; earlier states are untouched.
        ValueError: if the optimizer keeps something that is neither tensor, number nor text.
    """
    target = output / f"step-{state.step}.state"
    partial = output / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tensors, plain = _flatten(state.optimizer)
        write_safetensors(partial / TRAINED, state.trained)
        write_safetensors(partial / OPTIMIZER, tensors)
        values = {"step": state.step, "optimizer": plain, "values": state.values}
        write_text(partial / VALUES, json.dumps(values, indent=1) + "\n")
        if beside is not None:
            os.rename(beside, partial / beside.name.removeprefix("."))
        _verify(partial)
        sync(partial)
        _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    others = [folder for _, folder in list_states(output) if folder != target]
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_state(folder: Path) -> State:
    """Read a state.

    Raises:
        ValueError: if it is incomplete or damaged.
    """
    try:
        _verify(folder)
        written = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        return State(
            step=written["step"],
            trained=load_file(folder / TRAINED),
            optimizer=_unflatten(load_file(folder / OPTIMIZER), written["optimizer"]),
            values=written["values"],
            folder=folder,
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The state {folder} cannot be read: {error}.") from error


def find_state(output: Path, resume_from: str) -> Path:
    """The folder of the state to resume from: a path, or the newest complete one of `output` for "latest".

    Raises:
        ValueError: if there is none that is complete.
    """
    if resume_from != "latest":
        _verify(Path(resume_from))
        return Path(resume_from)
    reasons = []
    for _, folder in reversed(list_states(output)):
        try:
            _verify(folder)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return folder
    raise ValueError(f"{output} holds no complete trainer state to resume from. {' '.join(reasons)}".rstrip())


def list_states(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every state, by step."""
    if not output.is_dir():
        return []
    found = [(STATE_NAME.fullmatch(path.name), path) for path in output.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_partial(output: Path) -> None:
    """Remove what a killed run left half written."""
    for path in output.iterdir() if output.is_dir() else ():
        if PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name == ".deepspeed":
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.(step|epoch)-.*\.tmp\.safetensors", path.name):
            path.unlink(missing_ok=True)


def check_space(output: Path, num_bytes: int) -> None:
    """Refuse a save that will not fit.

    Raises:
        OSError: if there is less space than `num_bytes`.
    """
    free = shutil.disk_usage(output).free
    if free < num_bytes + FREE_MARGIN:
        raise OSError(
            f"The disk of {output} is full: a checkpoint needs {num_bytes:,} bytes, {free:,} are free. The "
            "last good checkpoint is untouched; free some space and go on with --resume_from latest."
        )


def bytes_of(*parts: Mapping[str, Any]) -> int:
    """Bytes of all tensors in (nested) mappings."""
    total = 0
    for part in parts:
        for value in part.values():
            if isinstance(value, Tensor):
                total += value.numel() * value.element_size()
            elif isinstance(value, Mapping):
                total += bytes_of(value)
    return total


def _verify(folder: Path) -> None:
    if not (folder / VALUES).is_file():
        raise ValueError(f"{folder} is no complete trainer state: it has no {VALUES}.")
    try:
        json.loads((folder / VALUES).read_text(encoding="utf-8"))
        for name in (TRAINED, OPTIMIZER):
            read_header(folder / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The trainer state {folder} is damaged: {error}.") from error


def _rename(partial: Path, target: Path) -> None:
    """Give the state its name; one that is there from an earlier try is replaced."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(partial, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flatten(optimizer: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state dict as tensors, and as plain values that JSON holds exactly."""
    tensors: dict[str, Tensor] = {}
    states: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer["state"].items():
        states[str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu()
            else:
                states[str(index)][name] = _plain(value, name)
    groups = [
        {key: _plain(value, key) for key, value in group.items()} for group in optimizer["param_groups"]
    ]
    return tensors, {"state": states, "param_groups": groups}


def _unflatten(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    states: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in plain["state"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        states[int(index)][name] = value
    groups = [{key: _pythonic(value) for key, value in group.items()} for group in plain["param_groups"]]
    return {"state": states, "param_groups": groups}


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    raise ValueError(
        f"The optimizer keeps {name} as {type(value).__name__}, which cannot be saved; take another one."
    )


def _pythonic(value: Any) -> Any:
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return [_pythonic(item) for item in value] if isinstance(value, list) else value
