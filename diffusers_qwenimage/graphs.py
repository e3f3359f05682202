"""CUDA graphs of the transformer's forward: its kernels launched as one, where launching takes the time.

A forward is some 1500 kernels. For small pictures a processor launches them more slowly than the GPU computes
them. A graph records the launches once for the shapes of a call, and replays them: the same kernels on the
same values, bit for bit, reading inputs from fixed places into which each call copies its own.

What a graph has recorded are addresses and numbers, so it is right only for the model as it was. `signature`
takes in where all weights lie, what the modules are and how the adapters are set; when it changes, all graphs
are dropped. Hooks, gradients, compilation and whatever else a recording would miss run launched (`why_not`).

Memory: a graph keeps the memory of one forward for itself; the graphs of a model share it, since one is
replayed at a time and its result is copied out. When memory runs out they are given up.
"""

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import backend
from .module_hooks import is_hooked, is_idle_dropout
from .prompt import pad
from .rotary import ImageShape
from .streams import join_recorded
from .transformer import Modulation

logger = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
MAX_GRAPHS = 4
# Share of a step after which launching counts as what takes the time. A GPU that is behind its processor is
# done long after the last launch; one that waits for launches is done right after it.
LAUNCH_BOUND = 0.85
# Values that a forward holds at a time for each token, in units of the model's width: q, k, v, attention, the
# MLP's four, what goes in and comes out of each; rounded up.
TOKEN_WIDTHS = 16

Replay = Callable[[], object]
Run = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """The arguments of one forward of the transformer.

    Attributes:
        hidden_states: [B, L, C].
        text: one [T_i, joint_attention_dim] per sample.
        timestep: sigma, [B].
        image_shapes: of every sample.
        residuals: ControlNet's, [B, L, D] each.
        kind: additional_t_cond, [B].
        modulation: see the transformer.
        attention_kwargs: see the transformer.
    """

    hidden_states: Tensor
    text: Sequence[Tensor]
    timestep: Tensor
    image_shapes: Sequence[ImageShape]
    residuals: Sequence[Tensor] = ()
    kind: Tensor | None = None
    modulation: Modulation | None = None
    attention_kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors, always in the same order."""
        some = [self.hidden_states, *self.text, self.timestep, *self.residuals]
        if self.kind is not None:
            some.append(self.kind)
        if self.modulation is not None:
            some += [self.modulation.image, self.modulation.text]
        return some

    def with_tensors(self, tensors: Sequence[Tensor]) -> "ModelCall":
        """The same call with other tensors, in the order of `tensors()`."""
        rest = iter(tensors)
        return ModelCall(
            hidden_states=next(rest),
            text=[next(rest) for _ in self.text],
            timestep=next(rest),
            image_shapes=self.image_shapes,
            residuals=[next(rest) for _ in self.residuals],
            kind=None if self.kind is None else next(rest),
            modulation=None if self.modulation is None else Modulation(image=next(rest), text=next(rest)),
            attention_kwargs=self.attention_kwargs,
        )

    def shape(self, *, with_text: bool = True) -> tuple[object, ...]:
        """What two calls must have in common to share a graph (without the text: to be alike in time)."""
        tensors = self.tensors() if with_text else [self.hidden_states, *self.residuals]
        return (
            tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors),
            tuple(self.image_shapes),
            (len(self.text), len(self.residuals), self.kind is None, self.modulation is None),
            tuple(sorted(self.attention_kwargs.items())),
        )


def forward(model: Any, call: ModelCall, *, is_padded: bool = False) -> Tensor:
    """The velocity [B, L, C] of `call`; with `is_padded` as diffusers' transformer takes it."""
    text, mask = pad(call.text) if is_padded else (list(call.text), None)
    velocity: Tensor = model(
        hidden_states=call.hidden_states,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=call.timestep,
        img_shapes=[list(call.image_shapes)] * len(call.text),
        controlnet_block_samples=list(call.residuals) or None,
        additional_t_cond=call.kind,
        attention_kwargs=dict(call.attention_kwargs),
        return_dict=False,
        **({} if call.modulation is None else {"modulation": call.modulation}),
    )[0]
    return velocity


def graphs_of(model: nn.Module) -> "Graphs":
    """The graphs of a transformer; they live as long as it does."""
    found = _GRAPHS.get(model)
    if found is None:
        found = _GRAPHS[model] = Graphs()
    return found


def release_when_full(model: nn.Module, run: Callable[[], Any]) -> Any:
    """`run()`; if device memory runs out while graphs of `model` hold some, give them up and run again."""
    graphs = graphs_of(model)
    try:
        return run()
    except torch.OutOfMemoryError:
        if not graphs.number:
            raise
    graphs.give_up("device memory ran out")
    return run()


class Graphs:
    """Runs calls of one transformer, recorded where that pays.

    Attributes:
        mode: "auto" records shapes for which launching takes the time, measured on the second call of a
            shape; "on" records every shape; "off" none.
        given_up: why nothing is recorded any more, after memory ran out.
        num_samples: that were computed so far, recorded or launched.
    """

    def __init__(
        self, record: "Callable[[Run, torch.device, Any], tuple[Replay, Tensor]] | None" = None
    ) -> None:
        self.given_up: str | None = None
        self.num_samples = 0
        self._mode = "auto"
        self._record = record or _capture
        self._needs_gpu = record is None
        self._pool: Any = None
        self._graphs: OrderedDict[object, _Recorded] = OrderedDict()
        self._warm: set[object] = set()
        self._launch_bound: dict[object, bool] = {}
        self._signature: int | None = None

    @property
    def mode(self) -> str:
        """What is recorded, see the class; setting it gives all graphs back.

        Raises:
            ValueError: if there is no such mode.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"CUDA graphs can be {', '.join(MODES)}, not {mode!r}.")
        self.release()
        self._mode = mode

    @property
    def number(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    def release(self) -> None:
        """Free all graphs and their memory, and measure and record anew from the next call on."""
        held_memory = self._pool is not None
        self._graphs.clear()
        self._warm.clear()
        self._launch_bound.clear()
        self._signature, self._pool, self.given_up = None, None, None
        if held_memory:
            torch.cuda.empty_cache()

    def give_up(self, reason: str) -> None:
        """Free all graphs and record none until `release` is called or the mode is set."""
        self.release()
        self.given_up = reason
        logger.warning(
            "CUDA graphs are given up, since %s: steps are launched kernel by kernel. "
            "`pipe.release_graphs()` allows them again.",
            reason,
        )

    def why_not(self, call: ModelCall) -> str | None:
        """Why this call cannot be recorded, apart from the state of the model; None if it can."""
        device = call.hidden_states.device
        if self._mode == "off":
            return "they are switched off"
        if self.given_up is not None:
            return self.given_up
        if self._needs_gpu and device.type != "cuda":
            return f"the device is {device.type}"
        if backend(device).name == "off":
            return "the fused path is off, and the plain one copies from the processor's memory"
        if torch.is_grad_enabled():
            return "gradients may be recorded"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        if set(call.attention_kwargs) - {"scale"}:
            return "attention_kwargs hold more than a scale"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a graph is being recorded around it"
        return None

    def __call__(self, model: nn.Module, call: ModelCall) -> Tensor:
        """The velocity [B, L, C] of `call`, replayed, recorded or launched."""
        self.num_samples += call.hidden_states.shape[0]
        if self.why_not(call) is not None:
            return forward(model, call)
        signature = signature_of(model)
        if signature is None or signature != self._signature:
            if self._graphs or self._warm:
                self.release()
            self._signature = signature
        if signature is None:
            return forward(model, call)
        key = call.shape()
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key](call)
        if self._launch_bound.get(call.shape(with_text=False)) is False:
            return forward(model, call)
        velocity: Tensor = release_when_full(model, lambda: self._advance(model, call, key))
        return velocity

    def _advance(self, model: nn.Module, call: ModelCall, key: object) -> Tensor:
        """The first calls of a shape: warm up, measure, record."""
        alike = call.shape(with_text=False)
        if key not in self._warm:  # kernels are compiled and chosen, weights laid out
            self._warm.add(key)
            velocity = forward(model, call)
            self._signature = signature_of(model)
            return velocity
        if self._mode == "auto" and alike not in self._launch_bound:
            velocity, share = _launching(lambda: forward(model, call), call.hidden_states.device)
            self._launch_bound[alike] = share >= LAUNCH_BOUND
            logger.info(
                "Launching takes %.0f %% of a step of %d x %d tokens: %s.",
                100 * share,
                *call.hidden_states.shape[:2],
                "a CUDA graph replaces it" if share >= LAUNCH_BOUND else "no CUDA graph is needed",
            )
            return velocity
        recorded = self._new(model, call)
        if recorded is None:
            return forward(model, call)
        self._graphs[key] = recorded
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return recorded(call)

    def _new(self, model: nn.Module, call: ModelCall) -> "_Recorded | None":
        device = call.hidden_states.device
        if self._pool is None and device.type == "cuda":
            if reason := _too_little_memory(model, call):
                self.give_up(reason)
                return None
            self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False):  # copied into by later calls, inside and outside of that mode
            fixed = [tensor.clone(memory_format=torch.contiguous_format) for tensor in call.tensors()]
        static = call.with_tensors(fixed)
        try:
            replay, result = self._record(lambda: forward(model, static), device, self._pool)
        except torch.OutOfMemoryError:
            reason = "device memory ran out"
        except RuntimeError as error:  # a mistake that is not of recording comes again below, launched
            reason = f"recording failed ({str(error).splitlines()[0]})"
        else:
            return _Recorded(replay=replay, fixed=fixed, result=result, kept=kept_by(model, call))
        self.give_up(reason)
        return None


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A graph.

    Attributes:
        replay: launches it.
        fixed: where it reads its inputs.
        result: where it writes its result.
        kept: tensors that it reads and that others may forget.
    """

    replay: Replay
    fixed: Sequence[Tensor]
    result: Tensor
    kept: Sequence[Tensor]

    def __call__(self, call: ModelCall) -> Tensor:
        for place, tensor in zip(self.fixed, call.tensors(), strict=True):
            place.copy_(tensor)
        self.replay()
        return self.result.clone()


def kept_by(model: Any, call: ModelCall) -> list[Tensor]:
    """The tensors that a forward finds in caches: rotary tables, and where tokens lie in the joint buffer."""
    from .fused import cached_tensors  # here, since it imports Triton

    lengths = tuple(sample.shape[0] for sample in call.text)
    device, num_image = call.hidden_states.device, call.hidden_states.shape[1]
    tables = model.pos_embed(list(call.image_shapes), max(lengths), device)
    target = prod(call.image_shapes[0]) if model.zero_cond_t else None
    return [*tables, *cached_tensors(num_image, lengths, num_target_tokens=target, device=device)]


def signature_of(model: nn.Module) -> int | None:
    """A number that changes when a recording of the model would no longer be right; None if none would be.

    Takes in the place and type of every weight, the class of every module and the state of PEFT's layers.
    Values that change in place are read by a replay and do not count.
    """
    parts: list[object] = []
    waiting: list[nn.Module] = [model]
    while waiting:  # plain dictionaries, since this runs before every replay
        module = waiting.pop()
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or ("forward" in state and is_hooked(module))
            or module._compiled_call_impl is not None
        ):
            return None
        parts.append(type(module))
        for tensor in state["_parameters"].values():
            if tensor is not None:
                if type(tensor) is not nn.Parameter:
                    return None
                parts += (tensor.data_ptr(), tensor.dtype)
        for tensor in state["_buffers"].values():
            if tensor is not None:
                parts += (tensor.data_ptr(), tensor.dtype)
        if "scaling" in state:  # a layer of PEFT
            parts += state["scaling"].items()
            parts += (*state["_active_adapter"], state["_disable_adapters"], len(state["merged_adapters"]))
        elif "processor" in state:
            parts += (type(state["processor"]), state["processor"].__dict__.get("_attention_backend"))
        elif "saves_memory" in state:  # a block
            parts.append(state["saves_memory"])
        elif "p" in state and isinstance(module, nn.Dropout) and not is_idle_dropout(module):
            return None
        waiting += [child for child in state["_modules"].values() if child is not None]
    return hash(tuple(parts))


def _capture(run: Run, device: torch.device, pool: Any) -> tuple[Replay, Tensor]:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device):
        # Other threads may load or free something meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                result = run()
            except RuntimeError:
                join_recorded()
                raise
    return graph.replay, result


def _too_little_memory(model: Any, call: ModelCall) -> str | None:
    """Why a graph of `call` would not find memory; None if it would.

    Asked before, since an allocation that fails in a recording can leave its memory behind.
    """
    device = call.hidden_states.device
    num_tokens = call.hidden_states.shape[:2].numel() + sum(sample.shape[0] for sample in call.text)
    needed = TOKEN_WIDTHS * num_tokens * model.inner_dim * call.hidden_states.element_size()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
    room = min(free, allowed)
    if room >= 1.5 * needed:
        return None
    return f"a graph needs about {needed / 2**30:.2f} GiB and {max(room, 0) / 2**30:.2f} are free"


def _launching(run: Run, device: torch.device) -> tuple[Tensor, float]:
    """The result of `run`, and which share of its time passed until its last kernel was launched."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda _: None)
    wait(device)
    started = time.perf_counter()
    result = run()
    launched = time.perf_counter()
    wait(device)
    done = time.perf_counter()
    return result, (launched - started) / (done - started)


_GRAPHS: "weakref.WeakKeyDictionary[nn.Module, Graphs]" = weakref.WeakKeyDictionary()
