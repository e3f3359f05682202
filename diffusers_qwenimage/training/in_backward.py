"""The optimizer's step inside of the backward pass: every weight takes it as soon as its gradient is known.

Then no two gradients exist at a time: fine-tuning the whole dit in bf16 takes its weights (41 GB), the
optimizer's states (Adafactor's are small; AdamW's can stay in host memory, `host_states.py`) and the
activations, and not another 41 GB of gradients. What needs all gradients together cannot be had: clipping to
their norm, skipping a step for it, adding up batches.

Weights in bf16 are stepped in fp32 and rounded at random, up or down by their distance to the two neighbours
(stochastic rounding, arXiv 2010.06192), so that updates smaller than half a bit are not lost on average.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .host_states import HostStates

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class StepsInBackward:
    """Looks like one optimizer over all parameters.

    Args:
        parameters: the trained weights.
        make: an optimizer over one of them.
        on_host: keeps the states in host memory; None: they stay on the device.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], make: Make, on_host: HostStates | None = None
    ) -> None:
        self._single = [_Single(parameter, make) for parameter in parameters]
        self._squares: Tensor | None = None
        self._on_host = on_host
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(index))
            for index, parameter in enumerate(parameters)
        ]

    def release(self) -> None:
        """Take no further steps: weights and hooks hold each other otherwise."""
        for hook in self._hooks:
            hook.remove()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all weights."""
        return [group for single in self._single for group in single.optimizer.param_groups]

    def norm(self) -> Tensor:
        """Norm of the gradient of the backward pass before, NaN if there was none; starts a new sum."""
        squares, self._squares = self._squares, None
        return torch.tensor(float("nan")) if squares is None else squares.sqrt()

    def step(self) -> None:
        """Nothing: it was taken."""

    def zero_grad(self) -> None:
        """Nothing: gradients are gone."""

    def state_dict(self) -> dict[str, Any]:
        """As that of one optimizer over all weights."""
        if self._on_host:
            self._on_host.settle()
        states = [single.optimizer.state_dict() for single in self._single]
        group = {**states[0]["param_groups"][0], "params": list(range(len(states)))}
        state = {index: each["state"][0] for index, each in enumerate(states) if each["state"]}
        return {"state": state, "param_groups": [group]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        if self._on_host:
            self._on_host.forget()
        for index, single in enumerate(self._single):
            entries = state["state"]
            group = {**state["param_groups"][0], "params": [0]}
            single.load({"state": {0: entries[index]} if index in entries else {}, "param_groups": [group]})
            if self._on_host:
                self._on_host.take(index, single.states)

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        single, on_host = self._single[index], self._on_host

        def take_step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            self._squares = square if self._squares is None else self._squares + square
            if on_host:
                on_host.bring(index)
            single.step(parameter.grad)
            if on_host:
                on_host.take(index, single.states)
            parameter.grad = None

        return take_step


class _Single:
    """One weight, and the optimizer over it or over its copy in fp32."""

    def __init__(self, parameter: nn.Parameter, make: Make) -> None:
        self._parameter = parameter
        self._is_rounded = parameter.dtype == torch.bfloat16
        self._wide = parameter
        if self._is_rounded:
            self._wide = nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))
        self.optimizer = make([self._wide])

    @property
    def states(self) -> dict[str, Any]:
        """What the optimizer keeps of the weight."""
        states: dict[str, Any] = self.optimizer.state[self._wide]
        return states

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step with this gradient."""
        if not self._is_rounded:
            self.optimizer.step()
            return
        self._wide.data = self._parameter.data.float()
        self._wide.grad = gradient.float()
        self.optimizer.step()
        self._parameter.copy_(round_at_random(self._wide.data))
        self._forget()

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of this weight; while it is, the weight must have its shape."""
        if self._is_rounded:
            self._wide.data = self._parameter.data.float()
        self.optimizer.load_state_dict(state)
        if self._is_rounded:
            self._forget()

    def _forget(self) -> None:
        self._wide.grad = None
        self._wide.data = self._wide.data.new_empty(0)


def round_at_random(values: Tensor) -> Tensor:
    """fp32 values as bf16, rounded up or down with a chance that makes the mean right."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    bits = values.contiguous().view(torch.int32) + noise  # carries into the bits that stay
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)
