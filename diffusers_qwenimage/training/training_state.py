"""What a run holds in memory that a state on the disk keeps: weights, optimizer states, moving averages."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .checkpoints import State
from .optimizers import MovingAverage
from .sharding import spread, spread_states, whole, whole_states
from .zero import FOLDER, Zero, shapes_of

EMA_PREFIX = "ema."


@dataclass(frozen=True, kw_only=True)
class Held:
    """Trained weights by name, their optimizer and their moving average, whole or spread over processes."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: Any
    average: MovingAverage | None

    def whole(self) -> tuple[Mapping[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """The optimizer's `state_dict`, weights and averages as whole tensors; all processes take part."""
        if isinstance(self.optimizer, Zero):  # which writes its states itself
            return {"state": {}, "param_groups": []}, self.optimizer.whole(self.parameters), {}
        states = self.optimizer.state_dict()
        tensors = {name: value.detach() for name, value in self.parameters.items()}
        averages = self.average.values if self.average else {}
        if not self._is_spread:
            return states, tensors, averages
        return (
            whole_states(states),
            {name: whole(value) for name, value in tensors.items()},
            {name: whole(value) for name, value in averages.items()},
        )

    def save_beside(self, output: Path) -> Path | None:
        """Write what the optimizer saves itself; returns its folder in `output`. All processes take part."""
        if not isinstance(self.optimizer, Zero):
            return None
        self.optimizer.save(output / f".{FOLDER}")
        return output / f".{FOLDER}"

    def take_over(self, state: State) -> None:
        """Put the values of a state in place.

        Raises:
            ValueError: if it is of other weights than these.
        """
        self._check(state)
        if isinstance(self.optimizer, Zero):
            assert state.folder is not None
            self.optimizer.load(state.folder / FOLDER)
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(spread(state.trained[name], parameter))
        states = dict(state.optimizer)
        if self._is_spread:
            states = spread_states(states, list(self.parameters.values()))
        self.optimizer.load_state_dict(states)
        if self.average:
            averages = {}
            for name, parameter in self.parameters.items():  # one order in all processes
                value = state.trained.get(f"{EMA_PREFIX}{name}", state.trained[name])
                averages[name] = spread(value, parameter)
            self.average.load(averages)

    @property
    def _is_spread(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self.parameters.values())

    def _check(self, state: State) -> None:
        saved = {name for name in state.trained if not name.startswith(EMA_PREFIX)}
        if saved != set(self.parameters):
            raise ValueError(
                "The state to resume from has other trained weights than this run: keep trainable_models, "
                "the LoRA's options and the model as they were."
            )
        for name, shape in zip(self.parameters, shapes_of(list(self.parameters.values())), strict=True):
            if shape != state.trained[name].shape:
                raise ValueError(
                    f"{name} has the shape {tuple(state.trained[name].shape)} in the state to resume from, "
                    f"but {tuple(shape)} here: keep lora_rank and the model."
                )


def make_state(
    step: int,
    optimizer: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> State:
    """The state after `step` steps, from what `Held.whole` gives."""
    named = {EMA_PREFIX + name: value for name, value in averages.items()}
    return State(step=step, trained={**tensors, **named}, optimizer=optimizer, values=values)
