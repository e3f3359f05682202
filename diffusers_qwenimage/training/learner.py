"""The trained models of a run, and what a step does with them: loss, gradients, update."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from .batch import Batch
from .config import ZERO_STAGES, TrainConfig
from .feed import Feed
from .graphs import StepGraphs, can_record
from .host_states import HostStates
from .in_backward import StepsInBackward
from .objective import Objective, flow_matching_loss
from .optimizers import make_optimizer
from .plan import Plan, Slot
from .randomness import Stream, seed_for
from .sharding import whole
from .trained import TrainedModels, compute_context, compute_dtype
from .zero import Zero

MODULATION_STEPS = 256  # for so many steps at a time the modulation is tabulated


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a step has computed when the weights have not changed yet.

    Attributes:
        loss: mean over the batches of this process.
        norm: of the gradient before it was clipped.
        names: of the samples.
        update: takes the step.
    """

    loss: Tensor
    norm: Tensor
    names: Sequence[str]
    update: Callable[[], object]


class Learner:
    """Computes the steps of one process.

    Args:
        config: the run's options.
        accelerator: of the run.
        trained: the models.
        plan: which samples are seen when.
        feed: makes batches of them.
        objective: weights of the loss.
        num_steps: optimizer steps of the run.

    Attributes:
        optimizer: over all trained weights.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        accelerator: Accelerator,
        trained: TrainedModels,
        plan: Plan,
        feed: Feed,
        objective: Objective,
        num_steps: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.trained = trained
        self.plan = plan
        self.feed = feed
        self.objective = objective
        self.num_steps = num_steps
        self.modules: Mapping[str, Any] = trained.modules
        self.optimizer = self._prepare()
        self._graphs = self._step_graphs()

    def gradients(self, step: int) -> Gradients:
        """Loss and gradients of a step, the gradients clipped."""
        if self._graphs is not None:
            slots = self.plan.batch(step, 0, 0)
            batch = self.feed.batch(slots)
            with self._modulated(batch):
                recorded = self._graphs.gradients(batch)
            if recorded is not None:
                loss, norm = recorded
                return Gradients(loss=loss, norm=norm, names=batch.names, update=self._graphs.update)
            self.feed.give_back(slots, batch)
        total = torch.zeros((), device=self.accelerator.device)
        names: list[str] = []
        averaged = [self.modules["dit"]] if "dit" in self.config.trained_models else []
        for micro in range(self.config.gradient_accumulation_steps):
            slots = self.plan.batch(step, micro, self.accelerator.process_index)
            is_zero = isinstance(self.optimizer, Zero)
            with nullcontext() if is_zero else self.accelerator.accumulate(*averaged):
                loss, used = self.loss(slots)
                if is_zero:
                    self.optimizer.backward(loss)
                # Steps in the backward pass cannot be taken back: a bad loss must stop before it.
                elif not self.config.optimizer_in_backward or bool(torch.isfinite(loss)):
                    self.accelerator.backward(loss)
            total += loss.detach() / self.config.gradient_accumulation_steps
            names += used
        self._average_others()
        return Gradients(loss=total, norm=self._clip(), names=names, update=self.optimizer.step)

    def loss(self, slots: Sequence[Slot]) -> tuple[Tensor, list[str]]:
        """The mean loss of a batch, and the names of its samples."""
        batch = self.feed.batch(slots)
        torch.manual_seed(seed_for(self.config.seed, Stream.DROPOUT, batch.counter))
        with self._modulated(batch):
            return self._loss_of(batch.to(self.accelerator.device)), list(batch.names)

    def prepare_modulation(self, step: int, first_step: int) -> None:
        """From time to time, compute the modulation for the sigmas of the steps to come."""
        table = self.trained.modulation
        if table is None or (step - first_step) % MODULATION_STEPS:
            return
        rank = self.accelerator.process_index
        slots = [
            slot
            for later in range(step, min(step + MODULATION_STEPS, self.num_steps))
            for micro in range(self.config.gradient_accumulation_steps)
            for slot in self.plan.batch(later, micro, rank)
        ]
        table.prepare(self.feed.sigmas(slots))

    def _prepare(self) -> Any:
        """The optimizer; on several processes the modules that average gradients take the place of ours."""
        parameters = list(self.trained.parameters.values())
        if self.config.optimizer_in_backward:
            on_host = HostStates(device=self.accelerator.device) if self.config.optimizer_on_host else None
            return StepsInBackward(parameters, partial(make_optimizer, self.config), on_host)
        if self.config.sharding in ZERO_STAGES:
            zero = Zero(self.config, self.modules["dit"], partial(make_optimizer, self.config))
            self.modules = {**self.modules, "dit": zero.engine}
            return zero
        optimizer = make_optimizer(self.config, parameters)
        if self.config.sharding != "none":
            return optimizer
        if "dit" not in self.config.trained_models:
            return self.accelerator.prepare(optimizer)
        dit, optimizer = self.accelerator.prepare(self.modules["dit"], optimizer)
        self.modules = {**self.modules, "dit": dit}
        return optimizer

    def _step_graphs(self) -> StepGraphs | None:
        if not can_record(self.config, self.accelerator.device, self.accelerator.num_processes):
            return None
        return StepGraphs(
            loss=self._loss_of,
            kept=self._kept_by,
            model=self.trained.modules["dit"],
            parameters=list(self.trained.parameters.values()),
            optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
            max_norm=self.config.max_grad_norm or float("inf"),
        )

    def _loss_of(self, batch: Batch) -> Tensor:
        """The mean loss of a batch on the device."""
        with compute_context(self.config, self.accelerator.device):
            losses = flow_matching_loss(
                self.modules["dit"],
                batch.clean,
                batch.noise,
                batch.sigma,
                self.objective.weight(batch.sigma),
                batch.prompt,
                batch.grid,
                dtype=compute_dtype(self.config),
            )
        return losses.mean()

    def _modulated(self, batch: Batch) -> AbstractContextManager[None]:
        """Within, the modulation is that of the batch's noise levels."""
        table = self.trained.modulation
        return nullcontext() if table is None else table.of(batch.sigma_on_host)

    def _kept_by(self, batch: Batch) -> Sequence[Tensor]:
        """The rotary tables of a batch, which the transformer keeps for a while only."""
        longest = max(text.shape[0] for text in batch.prompt)
        transformer: Any = self.trained.modules["dit"]
        tables: Sequence[Tensor] = transformer.pos_embed([(1, *batch.grid)], longest, batch.clean.device)
        return tables

    def _average_others(self) -> None:
        """Average over processes the gradients of text encoder and VAE, which are not called as modules."""
        if self.accelerator.num_processes == 1:
            return
        for name, parameter in self.trained.parameters.items():
            if not name.startswith("dit.") and parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _clip(self) -> Tensor:
        """Scale gradients down to `max_grad_norm`; returns their norm before."""
        limit = self.config.max_grad_norm or float("inf")
        parameters = list(self.trained.parameters.values())
        if isinstance(self.optimizer, StepsInBackward | Zero):
            return self.optimizer.norm()
        if self.config.sharding != "none":
            return cast(Tensor, whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm
