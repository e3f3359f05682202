"""What a block computes with, found out once: which layers are plain, which are quantised, which to call.

A `Plan` holds modules and their dictionaries of parameters, never tensors: weights may be replaced or moved
at any time (offloading, loading). It remembers what else it was made from (submodules, hooks, replaced
forwards, dropout) and is made anew when one of these is no longer the same object.

Shapes: N tokens, I inputs, O outputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.functional import gelu

from .kernels.matmul import linear_gelu_now, linear_into, linear_now
from .kernels.quantized import dequantize, gelu_quantize, scaled_linear
from .kernels.rows import Rows, Target
from .module_hooks import is_hooked, is_idle_dropout, is_only_streamed, is_plain_feed_forward
from .projections import joined, project, project_into, project_three_into
from .quantize.layers import QuantizedLinear, scaled_linear_of

NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
HEAD_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
TYPES = (torch.bfloat16, torch.float16, torch.float32)


class Layer:
    """A linear module, for tokens [N, I] or quantised rows of them.

    Attributes:
        target: how the layer wants its inputs quantised; None if it takes tokens.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.target = target_of([module], device)
        self._is_stored = is_stored(module, device)
        self._parameters = module._parameters if self._is_stored or is_plain(module) else None
        self._quantized = module._parameters, module._buffers  # read where the layer takes rows

    def __call__(self, x: Tensor | Rows, dtype: torch.dtype) -> Tensor:
        """The layer of x: [N, O] in `dtype`."""
        if isinstance(x, Rows):
            return self._scaled(x, dtype)
        dense = self._dense(dtype)
        if dense is None:
            return project(x, self.module)
        return linear_now(x, *dense)

    def into(self, out: Tensor, x: Tensor | Rows) -> None:
        """Write the layer of x into `out` [N, O], rows of any stride."""
        if isinstance(x, Rows):
            self._scaled(x, out.dtype, out)
            return
        dense = self._dense(out.dtype)
        if dense is None:
            project_into(out, x, self.module)
        else:
            linear_into(out, x, *dense)

    def with_gelu(self, x: Tensor | Rows, dtype: torch.dtype, *, triton: bool) -> Tensor:
        """GELU, tanh approximation, of the layer."""
        dense = None if isinstance(x, Rows) else self._dense(dtype)
        if dense is None or dense[1] is None:
            return gelu(self(x, dtype), approximate="tanh")
        assert isinstance(x, Tensor)
        return linear_gelu_now(x, dense[0], dense[1], triton=triton)

    def _scaled(self, rows: Rows, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        parameters, buffers = self._quantized
        weight, scale = cast(Tensor, parameters["weight"]), cast(Tensor, buffers["weight_scale"])
        return scaled_linear(rows, weight, scale, parameters["bias"], dtype, out)

    def _dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias to multiply tokens with; None if the module has to be called or taken apart."""
        if self._parameters is None:
            return None
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if type(weight) is not nn.Parameter:
            return None
        if self._is_stored:
            module = cast(QuantizedLinear, self.module)
            return dequantize(weight, module.weight_scale, dtype, module.rotation), bias
        return weight, bias


class Trio:
    """Queries, keys and values of one stream: one product where their weights lie behind each other.

    Attributes:
        target: as in `Layer`.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = modules
        self.target = target_of(modules, device)
        self._is_stored = all(is_stored(module, device) for module in modules)
        quantized = self.target is not None or self._is_stored
        whole = (quantized or all(map(is_plain, modules))) and not any(m.bias is None for m in modules)
        self._parameters = [module._parameters for module in modules] if whole else []
        self._scales = [module._buffers for module in modules] if whole and quantized else []
        self._addresses: list[int] = []
        self._num_rows: int | None = None  # of the three together, if they are behind each other

    def into(self, out: Tensor, x: Tensor | Rows) -> None:
        """Write the three side by side into `out` [N, 3 O]."""
        whole = self._whole()
        if whole is None:
            self._one_by_one(out, x)
            return
        weight, bias, scale = whole
        if isinstance(x, Rows):
            assert scale is not None
            scaled_linear(x, weight, scale, bias, out.dtype, out)
            return
        if scale is not None:
            weight = dequantize(weight, scale, out.dtype, cast(QuantizedLinear, self._modules[0]).rotation)
        linear_into(out, x, weight, bias)

    def _one_by_one(self, out: Tensor, x: Tensor | Rows) -> None:
        if not isinstance(x, Rows):
            project_three_into(out, x, self._modules)
            return
        for column, module in zip(out.chunk(3, dim=1), self._modules, strict=True):
            scaled_linear_of(x, cast(QuantizedLinear, module), out.dtype, column)

    def _whole(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Weight, bias and scales of the three as one tensor each, if they lie so in memory."""
        if not self._parameters:
            return None
        weights = [store["weight"] for store in self._parameters]
        biases = [store["bias"] for store in self._parameters]
        scales = [store["weight_scale"] for store in self._scales]
        tensors: list[Any] = weights + biases + scales
        if any(type(tensor) is not nn.Parameter for tensor in weights + biases):
            return None
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            self._addresses = addresses
            groups = [tensors[start : start + 3] for start in range(0, len(tensors), 3)]
            together = all(joined(group) is not None for group in groups)
            self._num_rows = sum(weight.shape[0] for weight in groups[0]) if together else None
        rows = self._num_rows
        if rows is None:
            return None
        weight, bias = tensors[0], tensors[3]
        scale = tensors[6].as_strided((rows, 1), (1, 1)) if scales else None
        inputs = weight.shape[1]
        return weight.as_strided((rows, inputs), (inputs, 1)), bias.as_strided((rows,), (1,)), scale


class Mlp:
    """Two linear layers with GELU between them; see `is_plain_feed_forward`."""

    def __init__(self, module: FeedForward, device: torch.device) -> None:
        first, _, last = cast(nn.ModuleList, module.net)
        self._up = Layer(cast(GELU, first).proj, device)
        self._down = Layer(last, device)
        self.target = self._up.target

    def __call__(self, x: Tensor | Rows, dtype: torch.dtype, *, triton: bool) -> Tensor:
        """The MLP of x: [N, D] in `dtype`."""
        return self._down(self._hidden(x, dtype, triton), dtype)

    def _hidden(self, x: Tensor | Rows, dtype: torch.dtype, triton: bool) -> Tensor | Rows:
        """What the second layer takes, [N, 4 D]."""
        if self._down.target is not None:
            return gelu_quantize(self._up(x, dtype), self._down.target)
        return self._up.with_gelu(x, dtype, triton=triton)


class Plan:
    """How one block is computed by the fused operations.

    Attributes:
        reason: why it cannot be; None if it can, and then:
        image_qkv, text_qkv, image_out, text_out, image_mlp, text_mlp: layers.
        attention: the backend of diffusers to call, or None for torch's own.
        attended_target: how both output projections want the attention quantised, if both do.
    """

    def __init__(self, block: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._made_for = dtype, device
        self.reason = _why_not(block, dtype)
        if self.reason is not None:
            return
        attn = block.attn
        self._watch(block)
        self.image_qkv = Trio([attn.to_q, attn.to_k, attn.to_v], device)
        self.text_qkv = Trio([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], device)
        self.image_out, self.text_out = Layer(attn.to_out[0], device), Layer(attn.to_add_out, device)
        self.image_mlp, self.text_mlp = Mlp(block.img_mlp, device), Mlp(block.txt_mlp, device)
        same = self.image_out.target == self.text_out.target
        self.attended_target = self.image_out.target if same else None

    def holds(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is still true, for tokens of this type on this device."""
        if self.reason is not None or (dtype, device) != self._made_for:
            return False
        return not any(self._hooks) and list(map(dict.get, self._stores, self._names)) == self._values

    def _watch(self, block: Any) -> None:
        self._hooks: list[dict[Any, Any]] = []
        self._stores: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        for name, child in block._modules.items():
            self._remember(block._modules, name, child)
        for module in _watched(block):
            if not is_hooked(module) or is_only_streamed(module):
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            for name, child in module._modules.items():
                self._remember(module._modules, name, child)
            names = ("training", "p") if type(module) is nn.Dropout else ()
            for name in ("forward", *names):
                self._remember(module.__dict__, name, module.__dict__.get(name))
        processor = block.attn.processor
        self._remember(block.attn.__dict__, "processor", processor)
        for name in ("_attention_backend", "_parallel_config"):
            self._remember(processor.__dict__, name, processor.__dict__.get(name))

    def _remember(self, store: dict[str, Any], name: str, value: Any) -> None:
        self._stores.append(store)
        self._names.append(name)
        self._values.append(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied block makes its own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def target_of(modules: Sequence[nn.Module], device: torch.device) -> Target | None:
    """How these layers of one input want it quantised; None if one of them does not."""
    targets = set()
    for module in modules:
        if type(module) is not QuantizedLinear or is_hooked(module):
            return None
        targets.add(module.target(device))
    return targets.pop() if len(targets) == 1 else None


def is_stored(module: nn.Module, device: torch.device) -> bool:
    """Whether this is a quantised layer that is computed in the type of the tokens."""
    return type(module) is QuantizedLinear and not is_hooked(module) and module.target(device) is None


def is_plain(module: nn.Module) -> bool:
    """Whether this is nothing but a linear layer."""
    return type(module) is nn.Linear and not is_hooked(module)


def _why_not(block: Any, dtype: torch.dtype) -> str | None:
    attn = block.attn
    if dtype not in TYPES:
        return f"the kernels are for {', '.join(map(str, TYPES))}, not {dtype}"
    if attn.processor._parallel_config is not None or _is_sharded(attn):
        return "the model is spread over several devices"
    if (is_hooked(attn) and not is_only_streamed(attn)) or any(
        is_hooked(getattr(block, name)) for name in NORMS
    ):
        return "a hook is on a layer"
    for name in HEAD_NORMS:
        norm = getattr(attn, name)
        if type(norm) is not RMSNorm or is_hooked(norm) or norm.weight.dtype != dtype:
            return f"{name} is not a plain RMSNorm of the type of the tokens"
    if not (is_plain_feed_forward(block.img_mlp) and is_plain_feed_forward(block.txt_mlp)):
        return "an MLP was changed"
    if not is_idle_dropout(attn.to_out[1]):
        return "dropout is active"
    return None


def _is_sharded(attn: Any) -> bool:
    """Whether tensor parallelism gave this rank some of the heads."""
    linear = getattr(attn.to_add_out, "base_layer", attn.to_add_out)
    return type(getattr(linear, "weight", None)).__name__ == "DTensor"


def _watched(block: Any) -> Iterator[nn.Module]:
    """The modules that decide how a block is computed; adapters are looked into every time.

    Not the block itself: a plan that led back to its block would keep both alive until Python looks for
    cycles, and gigabytes of weights with them.
    """
    pending = [block.attn, block.img_mlp, block.txt_mlp, *(getattr(block, name) for name in NORMS)]
    while pending:
        module = pending.pop()
        yield module
        if not hasattr(module, "base_layer"):
            pending += module.children()
