"""What a run writes as it goes: weights and states, and how it takes them over again."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from .checkpoints import State, bytes_of, check_space, save_state
from .config import TrainConfig
from .data import Sample
from .guard import Guard
from .hashing import digest_of
from .logs import write_card
from .models import ModelFiles
from .plan import Captions, Plan
from .publish import publish
from .trained import base_metadata, find_format, save_weights
from .training_state import Held, make_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Saves and restores one run. In a run of several processes each has one, and all call it together.

    Attributes:
        config, accelerator, files, samples, plan, captions: of the run.
        num_steps: optimizer steps of the run.
        dit: the transformer; its config is written beside its weights.
        held: weights, optimizer and moving average.
        guard: whose memory is saved too.
    """

    config: TrainConfig
    accelerator: Accelerator
    files: ModelFiles
    samples: Sequence[Sample]
    plan: Plan
    captions: Captions
    num_steps: int
    dit: nn.Module
    held: Held
    guard: Guard

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output_path)

    def is_due(self, step: int) -> bool:
        """Whether to save after so many steps."""
        if step == self.num_steps:
            return True
        if self.config.save_steps:
            return step % self.config.save_steps == 0
        return step % self.plan.steps_per_epoch == 0

    def save(self, step: int) -> Path:
        """Write weights and state; returns the path of the weights.

        Raises:
            OSError: if they cannot be written; earlier ones are untouched.
        """
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        by_epoch = within == 0 and not self.config.save_steps
        stem = f"epoch-{epoch - 1}" if by_epoch else f"step-{step}"
        last = self._place(f"{stem}.safetensors")
        optimizer, tensors, averages = self.held.whole()
        beside = self.held.save_beside(self.output)
        if self.accelerator.is_main_process:
            check_space(self.output, bytes_of(tensors, averages, optimizer) + 2 * bytes_of(tensors))
            metadata = base_metadata(self.config, self.files, step, step / self.plan.steps_per_epoch)
            for name, weights in (("", tensors), ("-ema", averages)):
                if weights:
                    file = self.output / f"{stem}{name}.safetensors"
                    save_weights(file, weights, self.config, metadata, dit=self.dit)
            values: dict[str, Any] = {
                "guard": self.guard.state(),
                "data": self._data_digest(),
                "weights": last.name,
                "config": asdict(self.config),
            }
            state = make_state(step, optimizer, tensors, averages, values)
            save_state(self.output, state, keep=self.config.keep_states, beside=beside)
        self.accelerator.wait_for_everyone()
        return last

    def restore(self, state: State) -> Path:
        """Take over a state; returns the weights that were saved with it.

        Raises:
            ValueError: if it is of other weights.
        """
        self.held.take_over(state)
        self.guard.load(state.values["guard"])
        if state.values["data"] != self._data_digest():
            logger.warning(
                "The pictures, their order or the size of a step differ from those of the saved state; the "
                "run goes on, but not as it would have."
            )
        logger.info("Resumed after step %d.", state.step)
        folder = self.output if state.folder is None else state.folder.parent
        return folder / str(state.values.get("weights", f"step-{state.step}.safetensors"))

    def finish(self, last: Path, *, step: int) -> None:
        """Write the model card, and push the result if all steps were done.

        Args:
            last: the weights that were written last.
            step: of them.

        Raises:
            FileNotFoundError: if they are not there any more.
            DownloadError: if the hub refuses or cannot be reached; everything is still in the folder.
        """
        if not self.accelerator.is_main_process:
            return
        if not last.exists():
            raise FileNotFoundError(f"The weights {last} of the saved state are not there any more.")
        config = self.config
        write_card(
            self.output,
            config,
            base=self.files.name,
            weights=last.name,
            step=step,
            images=len(self.samples),
        )
        if config.push_to_hub and step >= self.num_steps:
            publish(self.output, last, config.push_to_hub, config.hub, private=config.hub_private)

    def _place(self, name: str) -> Path:
        """Where weights are written; a folder for formats that are one."""
        path = self.output / name
        is_folder = self.config.is_lora and find_format(self.config).directory
        return path.with_suffix("") if is_folder else path

    def _data_digest(self) -> str:
        """Changes when a resumed run would not see the same samples."""
        plan = self.plan
        return digest_of(
            [(sample.digest, sample.size, sample.caption) for sample in self.samples],
            (plan.repeat, plan.batch_size, plan.accumulation * plan.world, plan.seed),
            (self.captions.prefix, self.captions.shuffle, self.captions.dropout),
        )
