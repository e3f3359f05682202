"""The training loop on accelerate: one process or several, and a resumed run repeats the uninterrupted one.

Everything that a step draws comes from counters (`randomness.py`, `plan.py`), so the state of a run is its
trained weights, its optimizer and the number of steps done.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from tqdm import tqdm

from .cache import Encoders, TensorCache
from .checkpoints import State, find_start, load_state
from .config import ZERO_STAGES, TrainConfig, comma_list
from .data import Sample, inspect_rows
from .feed import Feed
from .guard import Guard
from .learner import Learner
from .logs import Record, RunLog, check_loggers, describe
from .memory import text_encoder_budget
from .metadata import read_rows
from .models import ModelFiles, find_models
from .objective import Objective
from .optimizers import MovingAverage, find_optimizer, learning_rate_at, set_learning_rate
from .plan import Plan
from .processes import on_main_first
from .publish import check_login
from .saving import Saver
from .sharding import give_back_
from .stopping import StopSignal, output_lock, stop_on_sigterm
from .trained import (
    compute_context,
    compute_dtype,
    find_format,
    load_trained,
)
from .training_state import Held
from .validation import Validation
from .zero import check_deepspeed

logger = logging.getLogger(__name__)
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
    check_deepspeed(config)
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
            "several (accelerate launch --multi_gpu), and spread the weights over them with --sharding full "
            "or, by DeepSpeed, zero3."
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
        self.encoders = Encoders(
            files,
            cache,
            dtype=compute_dtype(config),
            device=accelerator.device,
            text_budget=text_encoder_budget(config.vram_limit) if config.cache else None,
        )
        self.is_sharded = config.sharding != "none"
        self.guard = Guard(spike_factor=config.spike_factor, max_bad=config.max_bad_steps)
        self.objective = Objective(config=config, scheduler_config=files.load_scheduler().config)
        on_gpu = accelerator.device.type == "cuda"
        self.feed = Feed(config, samples, self.encoders, self.objective, pin=on_gpu)

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
        self.fill_cache()
        if self._anyone_stopped():
            logger.warning("SIGTERM: stopped before the first step; what is cached is kept.")
            return self.output
        # Of a model that is spread over processes all have to take part.
        wanted = self.accelerator.is_main_process or self.is_sharded
        wanted = wanted and bool(self.config.validation_prompts)
        self.validation = Validation(self.config, self.encoders, self.files) if wanted else None
        if self.config.cache:
            self.encoders.release()
        self.prepare()
        done = self.first_step = 0 if state is None else state.step
        last = self.output if state is None else self.saver.restore(state)
        log = RunLog(self.output, done=done) if self.accelerator.is_main_process else None
        self._start_trackers()
        if done == 0:
            self._validate(0)
        progress = tqdm(
            total=self.num_steps,
            initial=done,
            desc="Training",
            disable=not self.accelerator.is_main_process,
        )
        for step in range(self.first_step, self.num_steps):
            started = time.perf_counter()
            record, ending = self._step(step, started)
            self._log(log, record, progress)
            done = step + 1
            if self.saver.is_due(done) or ending:
                last = self.saver.save(done)
                if log:
                    log.draw()
            if self._validates_after(done):
                self._validate(done)
            if ending:
                logger.warning("SIGTERM: saved after step %d; go on with --resume_from latest.", done)
                break
        progress.close()
        self.accelerator.end_training()
        self.saver.finish(last, step=done)
        return last

    def _step(self, step: int, started: float) -> tuple[Record, bool]:
        """One optimizer step; also whether to end after it (some process got SIGTERM)."""
        rate = learning_rate_at(self.config, step, self.num_steps)
        set_learning_rate(self.learner.optimizer, rate)
        self.learner.prepare_modulation(step, self.first_step)
        found = self.learner.gradients(step)
        if step + 1 < self.num_steps:
            self.feed.prepare(self.plan.batch(step + 1, 0, self.accelerator.process_index))
        facts = torch.stack([found.loss, torch.full_like(found.loss, float(self.stop.received))])
        facts = self.accelerator.reduce(facts, reduction="mean")
        # The one place in a step that waits for the device.
        mean_loss, stopping, norm_value = torch.cat([facts, found.norm.to(facts)[None]]).tolist()
        reason = self.guard.judge(mean_loss, norm_value)
        if reason:
            logger.warning(
                "Step %d is skipped for %s; samples: %s.", step + 1, reason, ", ".join(found.names)
            )
        else:
            found.update()
            if self.average:
                self.average.update(self.trained.parameters, step + 1)
        self.learner.optimizer.zero_grad()
        self.guard.stop_if_diverged(step + 1, reason, found.names)
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

    def fill_cache(self) -> None:
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

    def prepare(self) -> None:
        """Load the trained models, and make what works with them."""
        sizes = list(dict.fromkeys(sample.size for sample in self.samples))
        self.trained = load_trained(self.config, self.files, self.accelerator.device, sizes)
        for name in ("vae", "text_encoder"):
            if name in self.trained.modules:
                self.encoders.use(name, self.trained.modules[name])
        self.learner = Learner(
            config=self.config,
            accelerator=self.accelerator,
            trained=self.trained,
            plan=self.plan,
            feed=self.feed,
            objective=self.objective,
            num_steps=self.num_steps,
        )
        decay = self.config.ema_decay
        self.average = MovingAverage(decay, self.trained.parameters) if decay else None
        self.saver = Saver(
            config=self.config,
            accelerator=self.accelerator,
            files=self.files,
            samples=self.samples,
            plan=self.plan,
            captions=self.feed.captions,
            num_steps=self.num_steps,
            dit=self.trained.modules["dit"],
            held=Held(
                parameters=self.trained.parameters, optimizer=self.learner.optimizer, average=self.average
            ),
            guard=self.guard,
        )

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

    def _validates_after(self, step: int) -> bool:
        every = self.config.validation_steps
        return step == self.num_steps or (step % every == 0 if every else self.saver.is_due(step))

    def _validate(self, step: int) -> None:
        """Render the prompts; the main process does, the others wait."""
        if self.validation:
            weights = self.average.in_place_of(self.trained.parameters) if self.average else nullcontext()
            with weights, compute_context(self.config, self.accelerator.device):
                self.validation.render(
                    step, self.trained.modules["dit"], self.encoders, save=self.accelerator.is_main_process
                )
                if self.is_sharded and self.config.sharding not in ZERO_STAGES:
                    give_back_(self.trained.modules["dit"])
            if self.config.cache and "vae" not in self.trained.modules:
                self.encoders.release()
        self.accelerator.wait_for_everyone()
