"""The training loop on accelerate: one process or several, and a resumed run repeats the uninterrupted one.

Everything that a step draws comes from counters (`randomness.py`, `plan.py`), so the state of a run is its
trained weights, its optimizer and the number of steps done.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor
from tqdm import tqdm

from .batch import Batch
from .cache import Encoders, TensorCache
from .checkpoints import State, bytes_of, check_space, find_start, load_state, save_state
from .config import TrainConfig, comma_list
from .data import Sample, inspect_rows
from .feed import Feed
from .graphs import StepGraphs, can_record
from .guard import Guard
from .hashing import digest_of
from .held import Held, make_state
from .host_states import HostStates
from .in_backward import StepsInBackward
from .logs import Record, RunLog, check_loggers, describe, write_card
from .metadata import read_rows
from .models import ModelFiles, find_models
from .objective import Objective, flow_matching_loss
from .optimizers import MovingAverage, find_optimizer, learning_rate_at, make_optimizer, set_learning_rate
from .plan import Plan, Slot
from .processes import on_main_first
from .publish import check_login, publish
from .randomness import Stream, seed_for
from .sharding import give_back_, whole
from .stopping import StopSignal, output_lock, stop_on_sigterm
from .trained import (
    TrainedModels,
    base_metadata,
    compute_context,
    compute_dtype,
    find_format,
    load_trained,
    save_weights,
)
from .validation import Validation

logger = logging.getLogger(__name__)
MODULATION_STEPS = 256  # for so many steps at a time the modulation is tabulated
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def train(config: TrainConfig) -> Path:
    """Train as `config` says; returns the weights that were written last.

    SIGTERM saves after the step that is running, and returns.

    Raises:
        ValueError: for options, models or data that cannot be used, before weights are loaded; if the loss
            stays NaN (`guard.Diverged`).
        OSError: if files cannot be read or written; the last good checkpoint stays.
    """
    config.check()
    output = Path(config.output_path)
    if config.is_lora:
        find_format(config)
    find_optimizer(config)
    check_loggers(config)
    if config.push_to_hub:
        check_login(config.push_to_hub, config.hub)
    accelerator = Accelerator(
        mixed_precision="no",  # types are the trainer's business
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(comma_list(config.loggers)) or None,
        project_dir=str(output),
        # The text stream of the last block has no part in the loss.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"Training on {accelerator.distributed_type.value} is not available; start one process, or "
            "several (accelerate launch --multi_gpu), and spread the weights over them with --sharding full."
        )
    main = accelerator.is_main_process
    with stop_on_sigterm() as stop, output_lock(output, held_by_us=main):
        state_folder = find_start(config, output)
        files = find_models(config)
        samples = on_main_first(accelerator, lambda: inspect_rows(read_rows(config), config, progress=main))
        trainer = Trainer(config, accelerator, files, samples, stop)
        return trainer.run(None if state_folder is None else load_state(state_folder))


class Trainer:
    """One run: data, models, optimizer, and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        files: ModelFiles,
        samples: Sequence[Sample],
        stop: StopSignal,
    ) -> None:
        self.config = config = config.on_device(accelerator.device.type)
        self.accelerator = accelerator
        self.files = files
        self.samples = samples
        self.stop = stop
        self.output = Path(config.output_path)
        self.dtype = compute_dtype(config)
        self.plan = Plan(
            sizes=[sample.size for sample in samples],
            repeat=config.dataset_repeat,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            world=accelerator.num_processes,
            seed=config.seed,
        )
        self.num_steps = config.max_steps or config.num_epochs * self.plan.steps_per_epoch
        cache = TensorCache(Path(config.cache_path or self.output / "cache") if config.cache else None)
        self.encoders = Encoders(files, cache, dtype=self.dtype, device=accelerator.device)
        self.is_sharded = config.sharding != "none"
        self.guard = Guard(spike_factor=config.spike_factor, max_bad=config.max_bad_steps)
        self.objective = Objective(config=config, scheduler_config=files.load_scheduler().config)
        on_gpu = accelerator.device.type == "cuda"
        self.feed = Feed(config, samples, self.encoders, self.objective, pin=on_gpu)
        self.graphs: StepGraphs | None = None

    def run(self, state: State | None) -> Path:
        """Train from `state`, or from the start; returns the weights written last."""
        if self.accelerator.is_main_process:
            per_step = self.config.batch_size * self.config.gradient_accumulation_steps
            text = describe(
                self.config,
                base=self.files.name,
                device=str(self.accelerator.device),
                images=len(self.samples),
                steps=self.num_steps,
                per_step=per_step * self.accelerator.num_processes,
            )
            tqdm.write(text, file=sys.stderr)
        self._fill_cache()
        if self._anyone_stopped():
            logger.warning("SIGTERM: stopped before the first step; what is cached is kept.")
            return self.output
        # Of a model that is spread over processes all have to take part.
        wanted = self.accelerator.is_main_process or self.is_sharded
        wanted = wanted and bool(self.config.validation_prompts)
        self.validation = Validation(self.config, self.encoders, self.files) if wanted else None
        if self.config.cache:
            self.encoders.release()
        self._prepare_models()
        done = 0 if state is None else self._restore(state)
        self.first_step = done
        log = RunLog(self.output, done=done) if self.accelerator.is_main_process else None
        self._start_trackers()
        if done == 0:
            self._validate(0)
        last = self.output / f"step-{done}.safetensors"
        progress = tqdm(
            total=self.num_steps,
            initial=done,
            desc="Training",
            disable=not self.accelerator.is_main_process,
        )
        for step in range(done, self.num_steps):
            started = time.perf_counter()
            record, ending = self._step(step, started)
            self._log(log, record, progress)
            if self._saves_after(step + 1) or ending:
                last = self._save(step + 1)
                if log:
                    log.draw()
            if self._validates_after(step + 1):
                self._validate(step + 1)
            if ending:
                logger.warning("SIGTERM: saved after step %d; go on with --resume_from latest.", step + 1)
                break
        progress.close()
        self._finish(last)
        return last

    # --- a step ---

    def _step(self, step: int, started: float) -> tuple[Record, bool]:
        """One optimizer step; also whether to end after it (some process got SIGTERM)."""
        rate = learning_rate_at(self.config, step, self.num_steps)
        set_learning_rate(self.optimizer, rate)
        self._prepare_modulation(step)
        total, norm, names, update = self._gradients(step)
        if step + 1 < self.num_steps:
            self.feed.prepare(self.plan.batch(step + 1, 0, self.accelerator.process_index))
        facts = torch.stack([total, torch.full_like(total, float(self.stop.received))])
        facts = self.accelerator.reduce(facts, reduction="mean")
        # The one place in a step that waits for the device.
        mean_loss, stopping, norm_value = torch.cat([facts, norm.to(facts)[None]]).tolist()
        reason = self.guard.judge(mean_loss, norm_value)
        if reason:
            logger.warning("Step %d is skipped for %s; samples: %s.", step + 1, reason, ", ".join(names))
        else:
            update()
            if self.average:
                self.average.update(self.trained.parameters, step + 1)
        self.optimizer.zero_grad()
        self.guard.stop_if_diverged(step + 1, reason, names)
        record = Record(
            step=step + 1,
            epoch=step // self.plan.steps_per_epoch,
            loss=mean_loss,
            learning_rate=rate,
            grad_norm=norm_value,
            seconds=round(time.perf_counter() - started, 4),
            skipped=reason.replace(",", ";"),
        )
        return record, stopping > 0

    def _gradients(self, step: int) -> tuple[Tensor, Tensor, list[str], Callable[[], object]]:
        """Loss, norm of the gradient (clipped after that), names of the samples, and what takes the step."""
        if self.graphs is not None:
            slots = self.plan.batch(step, 0, 0)
            batch = self.feed.batch(slots)
            with self._modulated(batch):
                recorded = self.graphs.gradients(batch)
            if recorded is not None:
                return *recorded, list(batch.names), self.graphs.update
            self.feed.give_back(slots, batch)
        total = torch.zeros((), device=self.accelerator.device)
        names: list[str] = []
        for micro in range(self.config.gradient_accumulation_steps):
            slots = self.plan.batch(step, micro, self.accelerator.process_index)
            with self.accelerator.accumulate(*self.modules.values()):
                loss, used = self._loss(slots)
                # Steps in the backward pass cannot be taken back: a bad loss must stop before it.
                if not self.config.optimizer_in_backward or bool(torch.isfinite(loss)):
                    self.accelerator.backward(loss)
            total += loss.detach() / self.config.gradient_accumulation_steps
            names += used
        return total, self._clip(), names, self.optimizer.step

    def _loss(self, slots: Sequence[Slot]) -> tuple[Tensor, list[str]]:
        """The mean loss of a batch, and the names of its samples."""
        batch = self.feed.batch(slots)
        torch.manual_seed(seed_for(self.config.seed, Stream.DROPOUT, batch.counter))
        with self._modulated(batch):
            return self._loss_of(batch.to(self.accelerator.device)), list(batch.names)

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
                dtype=self.dtype,
            )
        return losses.mean()

    def _modulated(self, batch: Batch) -> AbstractContextManager[None]:
        """Within, the modulation is that of the batch's noise levels."""
        table = self.trained.modulation
        return nullcontext() if table is None else table.of(batch.sigma_on_host)

    def _clip(self) -> Tensor:
        """Scale gradients down to `max_grad_norm`; returns their norm before."""
        limit = self.config.max_grad_norm or float("inf")
        parameters = list(self.trained.parameters.values())
        if isinstance(self.optimizer, StepsInBackward):
            return self.optimizer.norm()
        if self.is_sharded:
            return cast(Tensor, whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, limit)
        return norm

    def _prepare_modulation(self, step: int) -> None:
        """From time to time, compute the modulation for the sigmas of the steps to come."""
        table = self.trained.modulation
        if table is None or (step - self.first_step) % MODULATION_STEPS:
            return
        rank = self.accelerator.process_index
        slots = [
            slot
            for later in range(step, min(step + MODULATION_STEPS, self.num_steps))
            for micro in range(self.config.gradient_accumulation_steps)
            for slot in self.plan.batch(later, micro, rank)
        ]
        table.prepare(self.feed.sigmas(slots))

    # --- set-up ---

    def _fill_cache(self) -> None:
        """Each process makes its share of the cache; afterwards VAE and text encoder are not in memory."""
        if not self.config.cache:
            return
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        texts = dict.fromkeys(text for s in self.samples for text in self.feed.captions.all_texts(s.caption))
        pictures = list({(sample.digest, sample.size): sample for sample in self.samples}.values())
        trained = self.config.trained_models
        self.encoders.fill(
            [] if "vae" in trained else pictures[rank::world],
            [] if "text_encoder" in trained else list(texts)[rank::world],
            progress=self.accelerator.is_main_process,
            stopped=lambda: self.stop.received,
        )
        self.accelerator.wait_for_everyone()

    def _anyone_stopped(self) -> bool:
        flag = torch.tensor(float(self.stop.received), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    def _prepare_models(self) -> None:
        sizes = list(dict.fromkeys(sample.size for sample in self.samples))
        self.trained: TrainedModels = load_trained(self.config, self.files, self.accelerator.device, sizes)
        for name in ("vae", "text_encoder"):
            if name in self.trained.modules:
                self.encoders.use(name, self.trained.modules[name])
        modules: Mapping[str, Any] = self.trained.modules
        parameters = list(self.trained.parameters.values())
        optimizer: Any
        if self.config.optimizer_in_backward:
            on_host = HostStates(device=self.accelerator.device) if self.config.optimizer_on_host else None
            optimizer = StepsInBackward(parameters, partial(make_optimizer, self.config), on_host)
        else:
            optimizer = make_optimizer(self.config, parameters)
        if not self.is_sharded and not self.config.optimizer_in_backward:
            *prepared, optimizer = self.accelerator.prepare(*modules.values(), optimizer)
            modules = dict(zip(modules, prepared, strict=True))
        self.modules, self.optimizer = modules, optimizer
        device, num_processes = self.accelerator.device, self.accelerator.num_processes
        if can_record(self.config, device, num_processes):
            self.graphs = StepGraphs(
                loss=self._loss_of,
                kept=self._kept_by,
                model=self.trained.modules["dit"],
                parameters=list(self.trained.parameters.values()),
                optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
                max_norm=self.config.max_grad_norm or float("inf"),
            )
        decay = self.config.ema_decay
        self.average = MovingAverage(decay, self.trained.parameters) if decay else None

    def _kept_by(self, batch: Batch) -> Sequence[Tensor]:
        """The rotary tables of a batch, which the transformer keeps for a while only."""
        longest = max(text.shape[0] for text in batch.prompt)
        transformer: Any = self.trained.modules["dit"]
        tables: Sequence[Tensor] = transformer.pos_embed([(1, *batch.grid)], longest, batch.clean.device)
        return tables

    def _start_trackers(self) -> None:
        if self.config.loggers:
            settings = {
                name: value if isinstance(value, int | float | str | bool) else str(value)
                for name, value in asdict(self.config).items()
            }
            self.accelerator.init_trackers("qwenimage", config=settings)

    def _log(self, log: RunLog | None, record: Record, progress: Any) -> None:
        if log is None:
            return
        log.add(record)
        progress.update()
        progress.set_postfix(loss=f"{record.loss:.4f}", epoch=record.epoch)
        if self.config.loggers:
            values = {"loss": record.loss, "lr": record.learning_rate, "grad_norm": record.grad_norm}
            self.accelerator.log(values, step=record.step)

    # --- saving ---

    def _saves_after(self, step: int) -> bool:
        if step == self.num_steps:
            return True
        if self.config.save_steps:
            return step % self.config.save_steps == 0
        return step % self.plan.steps_per_epoch == 0

    def _save(self, step: int) -> Path:
        """Write weights and state; returns the path of the weights."""
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        by_epoch = within == 0 and not self.config.save_steps
        stem = f"epoch-{epoch - 1}" if by_epoch else f"step-{step}"
        held = self._held()
        optimizer, tensors, averages = held.whole()
        path = self.output / f"{stem}.safetensors"
        if self.accelerator.is_main_process:
            check_space(self.output, bytes_of(tensors, averages, optimizer) + 2 * bytes_of(tensors))
            metadata = base_metadata(self.config, self.files, step, step / self.plan.steps_per_epoch)
            dit = self.trained.modules["dit"]
            for name, weights in (("", tensors), ("-ema", averages)):
                if weights:
                    file = self.output / f"{stem}{name}.safetensors"
                    save_weights(file, weights, self.config, metadata, dit=dit)
            values = {
                "guard": self.guard.state(),
                "data": self._data_digest(),
                "config": asdict(self.config),
            }
            state = make_state(step, optimizer, tensors, averages, values)
            save_state(self.output, state, keep=self.config.keep_states)
        self.accelerator.wait_for_everyone()
        return path

    def _held(self) -> Held:
        """What a state saves and restores."""
        return Held(parameters=self.trained.parameters, optimizer=self.optimizer, average=self.average)

    def _restore(self, state: State) -> int:
        """Take over a state; returns the number of steps done."""
        self._held().take_over(state)
        self.guard.load(state.values["guard"])
        if state.values["data"] != self._data_digest():
            logger.warning(
                "The pictures, their order or the size of a step differ from those of the saved state; the "
                "run goes on, but not as it would have."
            )
        logger.info("Resumed after step %d.", state.step)
        return state.step

    def _data_digest(self) -> str:
        """Changes when a resumed run would not see the same samples."""
        plan = self.plan
        return digest_of(
            [(sample.digest, sample.size, sample.caption) for sample in self.samples],
            (plan.repeat, plan.batch_size, plan.accumulation * plan.world, plan.seed),
            (self.feed.captions.prefix, self.feed.captions.shuffle, self.feed.captions.dropout),
        )

    def _validates_after(self, step: int) -> bool:
        every = self.config.validation_steps
        return step == self.num_steps or (step % every == 0 if every else self._saves_after(step))

    def _validate(self, step: int) -> None:
        """Render the prompts; the main process does, the others wait."""
        if self.validation:
            weights = self.average.in_place_of(self.trained.parameters) if self.average else nullcontext()
            with weights, compute_context(self.config, self.accelerator.device):
                self.validation.render(
                    step, self.trained.modules["dit"], self.encoders, save=self.accelerator.is_main_process
                )
                if self.is_sharded:
                    give_back_(self.trained.modules["dit"])
            if self.config.cache and "vae" not in self.trained.modules:
                self.encoders.release()
        self.accelerator.wait_for_everyone()

    def _finish(self, last: Path) -> None:
        self.accelerator.end_training()
        if self.accelerator.is_main_process and last.exists():
            write_card(
                self.output,
                self.config,
                base=self.files.name,
                weights=last.name,
                step=self.num_steps,
                images=len(self.samples),
            )
            if self.config.push_to_hub and not self.stop.received:
                publish(
                    self.output,
                    last,
                    self.config.push_to_hub,
                    self.config.hub,
                    private=self.config.hub_private,
                )
