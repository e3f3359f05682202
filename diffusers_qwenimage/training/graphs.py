"""Training steps as CUDA graphs: forward, backward, and the optimizer's step, each launched as one.

A step of the published model is some 15,000 kernels; processors exist that take a second to launch them,
while the GPU computes them in a third of that. A graph records the launches once for the shapes of a batch
(number of image tokens, lengths of the captions) and replays them: the same kernels on the same values. It
reads its inputs from fixed places into which each step copies its own, and leaves the gradients in fixed
places.

The graphs share one pool of memory: a step's activations and gradients are dead when the next one starts. To
let the next recording use the place of the gradients again, they are known by address only.

Between the two graphs of a step the loss and the norm of the gradient come back to the processor, which
decides whether the step is taken (`guard.py`).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_qwenimage.kernels import backend
from diffusers_qwenimage.offload.recording import recording, replaying

from .batch import Batch
from .config import TrainConfig

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
Kept = Callable[[Batch], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A recorded step.

    Attributes:
        batch: where it reads its inputs.
        gradients: launches forward and backward.
        update: launches clipping and the optimizer's step; None if that cannot be recorded.
        loss, norm: where the results are.
        grads: of the trained weights, in their order; None where a weight has none.
        kept: tensors that it reads and that others may forget.
    """

    batch: Batch
    gradients: torch.cuda.CUDAGraph
    update: torch.cuda.CUDAGraph | None
    loss: Tensor
    norm: Tensor
    grads: Sequence[Tensor | None]
    kept: Sequence[Tensor]


class StepGraphs:
    """Records and replays steps of one run.

    Args:
        loss: the loss of a batch on the device.
        kept: tensors that the loss of a batch finds in caches.
        model: the trained model, which may stream its weights.
        parameters: the trained weights.
        optimizer: torch's AdamW with `capturable`, whose step is recorded too, or another one.
        max_norm: the gradient is scaled down to this norm; infinite for never.
    """

    def __init__(
        self,
        *,
        loss: Callable[[Batch], Tensor],
        kept: Kept,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        max_norm: float,
    ) -> None:
        self._loss = loss
        self._kept = kept
        self._model = model
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._graphs: OrderedDict[object, Recorded] = OrderedDict()
        self._seen: set[object] = set()
        self._pool: Any = None
        self._current: Recorded | None = None
        self.given_up = False

    @property
    def number(self) -> int:
        """Graphs there are."""
        return len(self._graphs)

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Compute the gradients of a batch in host memory, and return its loss and the gradient's norm.

        None if this shape comes for the first time, or nothing can be recorded: then the step must be
        launched, which also compiles and chooses what a recording needs.
        """
        key = batch.shape
        recorded = self._graphs.get(key)
        if recorded is None:
            if self.given_up or key not in self._seen:
                self._seen.add(key)
                return None
            recorded = self._record(batch)
            if recorded is None:
                return None
            self._graphs[key] = recorded
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        recorded.batch.copy_(batch)
        with replaying(self._model):
            recorded.gradients.replay()
        self._current = recorded
        return recorded.loss, recorded.norm

    def update(self) -> None:
        """Clip the gradients of the last batch and let the optimizer take its step."""
        assert self._current is not None
        if self._current.update is not None:
            self._current.update.replay()
            return
        _set_gradients(self._parameters, self._current.grads)
        self._step(self._current.norm)
        _set_gradients(self._parameters, [None] * len(self._parameters))

    def _step(self, norm: Tensor) -> None:
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._max_norm != float("inf"):
            torch._foreach_mul_(grads, clip_factor(norm, self._max_norm))
        self._optimizer.step()

    def _record(self, batch: Batch) -> Recorded | None:
        device = self._parameters[0].device
        static = batch.map(lambda tensor: tensor.to(device, copy=True))
        _set_gradients(self._parameters, [None] * len(self._parameters))
        if self._pool is None and not has_room(device):
            self._give_up("there is too little free device memory for a step's activations beside the others")
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return self._capture(static)
        except torch.OutOfMemoryError:
            self._give_up("device memory ran out")
            return None
        except RuntimeError as error:  # what is wrong with the step itself shows when it is launched
            self._give_up(f"a part of them cannot be ({str(error).splitlines()[0]})")
            return None
        finally:
            _set_gradients(self._parameters, [None] * len(self._parameters))

    def _give_up(self, reason: str) -> None:
        logger.warning("Steps are launched kernel by kernel and not recorded, since %s.", reason)
        self.given_up = True
        self._graphs.clear()

    def _capture(self, static: Batch) -> Recorded:
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first, pool=self._pool):
            with recording(self._model):
                loss = self._loss(static)
                loss.backward()
            norm = total_norm([p.grad for p in self._parameters if p.grad is not None])
        result, norm_there = loss.detach(), norm
        # Results must outlive the next recording, which may use the memory of everything else.
        grads = [None if p.grad is None else by_address(p.grad) for p in self._parameters]
        can_record = all(group.get("capturable", False) for group in self._optimizer.param_groups)
        if can_record:
            with torch.cuda.graph(second, pool=self._pool):
                self._step(norm_there)
        return Recorded(
            batch=static,
            gradients=first,
            update=second if can_record else None,
            loss=result,
            norm=norm_there,
            grads=grads,
            kept=list(self._kept(static)),
        )


def can_record(config: TrainConfig, device: torch.device, num_processes: int) -> bool:
    """Whether steps can be CUDA graphs: one process, fused blocks, nothing that changes from step to step."""
    return (
        config.cuda_graphs
        and device.type == "cuda"
        and backend(device).name != "off"
        and num_processes == 1
        and config.gradient_accumulation_steps == 1
        and config.trained_models == ("dit",)
        and (config.is_lora and config.adapter == "lora" and config.lora_dropout == 0)
        and config.checkpointing != "offload"
    )


def has_room(device: torch.device) -> bool:
    """Whether a recording will find memory: asked before, since one that fails leaves memory behind.

    It needs what steps have needed so far on top of what stays, and some more for other sizes of pieces.
    """
    torch.cuda.empty_cache()
    needed = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
    return min(free, allowed) >= 1.15 * needed


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together."""
    norms: list[Tensor] = list(torch._foreach_norm(list(grads)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What a gradient of this norm is multiplied by, as in `torch.nn.utils.clip_grad_norm_`."""
    return torch.clamp(limit / (norm + 1e-6), max=1.0)


def by_address(tensor: Tensor) -> Tensor:
    """The same memory without owning it: it may be given to somebody else meanwhile.

    The tensor itself where this torch cannot say that: then every recording keeps gradients of its own.
    """
    construct = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if construct is None:
        return tensor
    stored = tensor.untyped_storage()
    storage = construct(stored.data_ptr(), tensor.device, stored.nbytes())
    there = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return there


def _set_gradients(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
