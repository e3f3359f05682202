"""DeepSpeed's ZeRO: gradients and optimizer states spread over the processes (2), the weights too (3).

DeepSpeed has masters in fp32 of its own, clips by itself, and takes the step with the last backward pass of
it. So a step cannot be left out when its gradient is known; a bad loss is seen before. Weights are saved
whole, as everywhere; what DeepSpeed needs for going on it writes itself, for the same number of processes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from .config import ZERO_STAGES, TrainConfig
from .guard import Diverged

FOLDER = "deepspeed"  # of a state


def check_deepspeed(config: TrainConfig) -> None:
    """Refuse ZeRO without DeepSpeed, or without processes to spread anything over.

    Raises:
        ValueError: saying what is missing.
    """
    if config.sharding not in ZERO_STAGES:
        return
    if find_spec("deepspeed") is None:
        raise ValueError(f"sharding {config.sharding} needs DeepSpeed: pip install deepspeed, or take full.")
    if not int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"sharding {config.sharding} needs several processes: accelerate launch --multi_gpu."
        )


class Zero:
    """A transformer under DeepSpeed; looks like an optimizer.

    Args:
        config: the run's options.
        transformer: its trained weights are spread.
        make: an optimizer over parameters.

    Attributes:
        engine: DeepSpeed's module, to be called in the transformer's place.
    """

    def __init__(
        self,
        config: TrainConfig,
        transformer: Any,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        import deepspeed  # type: ignore[import-not-found]

        for block in transformer.transformer_blocks:
            block.attn.is_laid_out = True  # DeepSpeed moves weights: no common storage for q, k, v
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=transformer, optimizer=make(trained), config=settings_of(config)
        )
        self._has_bad_loss = False
        self._num_batches = config.gradient_accumulation_steps

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer."""
        groups: list[dict[str, Any]] = self.engine.optimizer.param_groups
        return groups

    def backward(self, loss: Tensor) -> None:
        """The backward pass, and after the last batch of a step the step; neither for a bad loss.

        Raises:
            Diverged: for a bad loss among several batches, whose gradients cannot be taken back.
        """
        is_good = torch.isfinite(loss.detach()).float()
        distributed.all_reduce(is_good, distributed.ReduceOp.MIN)
        self._has_bad_loss = not bool(is_good)
        if not self._has_bad_loss:
            self.engine.backward(loss)
            self.engine.step()
        elif self._num_batches > 1:
            raise Diverged(
                "The loss of a batch is NaN or infinite, and DeepSpeed cannot leave out one of several. "
                "Nothing of this step was saved; go on from the last checkpoint with --resume_from latest."
            )

    def norm(self) -> Tensor:
        """Norm of the last step's gradient, NaN if there was none."""
        return torch.tensor(float("nan") if self._has_bad_loss else float(self.engine.get_global_grad_norm()))

    def step(self) -> None:
        """Nothing: it was taken."""

    def zero_grad(self) -> None:
        """Nothing: DeepSpeed did."""

    def whole(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The trained weights, fp32, on the CPU; all processes take part."""
        from deepspeed.utils import safe_get_full_fp32_param  # type: ignore[import-not-found]

        return {name: safe_get_full_fp32_param(value).cpu() for name, value in parameters.items()}

    def save(self, folder: Path) -> None:
        """Write what is needed for going on; all processes take part."""
        self.engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """The reverse of `save`.

        Raises:
            ValueError: if the folder has none, or of another number of processes.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder.parent} was not saved under DeepSpeed: keep sharding as it was.")
        try:
            self.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except (AssertionError, RuntimeError, KeyError) as error:  # what DeepSpeed raises
            raise ValueError(f"DeepSpeed cannot go on from {folder}: {error}") from error


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "zero_optimization": {"stage": ZERO_STAGES[config.sharding]},
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def shapes_of(parameters: Sequence[nn.Parameter]) -> list[torch.Size]:
    """Shapes of whole weights, also of those that are spread."""
    return [getattr(parameter, "ds_shape", parameter.shape) for parameter in parameters]
