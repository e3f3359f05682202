"""The frozen modulation as a table, so that a third of the model's weights need not be on the device.

Shift, scale and gate of every block are a function of the timestep alone: W silu(t) + b, with t the embedding
of sigma. Training draws its sigmas from few values (the reference's grid has 1000, of which 376 differ in
bf16), and the sigmas of coming steps are known beforehand. So the weights W visit the device once, layer by
layer, and leave a row per sigma in host memory; a step copies its rows (4.4 MB each for the published model).
Every row is computed by itself, exactly as a block computes it for one picture: the loss is bit-equal.

A LoRA on these layers stays as it is: PEFT adds it to what the replaced layer returns.

Shapes: S sigmas, B samples, N modulated layers (two per block), D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, silu

MAX_ROWS = 1024  # rows that are kept at a time
LAYERS = ("img_mod", "txt_mod")


class TabulatedLinear(nn.Module):
    """Stands in for a frozen linear layer: returns the rows of the current step.

    The weights are no parameters of this module any more: they stay where they are, usually in host memory.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight_there: Tensor | None = layer.weight.detach()
        self.bias_there: Tensor | None = None if layer.bias is None else layer.bias.detach()
        self.current: Tensor | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in a type, [O, I]; for whoever needs it after all."""
        assert self.weight_there is not None, "the weights were dropped"
        device = self.weight_there.device if self.current is None else self.current.device
        return self.weight_there.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The rows of this step [B or 1, O], in the shape that the layer would return for `x` [..., I]."""
        assert self.current is not None, "ModulationRows.of comes first"
        if x.ndim == 2:
            return self.current
        return self.current.view(-1, *[1] * (x.ndim - 2), self.out_features)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ModulationRows:
    """The modulation of a transformer by table.

    Args:
        transformer: ours; its modulation layers are replaced in place.
        dtype: what it computes in; timesteps are rounded to it.
        device: where it computes.
        embed: embeds the timestep on the device, if the transformer's own module cannot be called outside of
            its forward.

    Raises:
        ValueError: if its modulation depends on more than the timestep, or is trained itself.
    """

    def __init__(
        self, transformer: Any, *, dtype: torch.dtype, device: torch.device, embed: Any = None
    ) -> None:
        if transformer.config.zero_cond_t or transformer.config.use_additional_t_cond:
            raise ValueError("The modulation of this transformer depends on more than the timestep.")
        self._embed = transformer.time_text_embed if embed is None else embed
        self._dtype = dtype
        self._device = device
        self._layers = [_replace(block, name) for block in transformer.transformer_blocks for name in LAYERS]
        self._rows: dict[float, Tensor] = {}
        self._current: dict[int, Tensor] = {}
        self._is_selected = False
        transformer.register_forward_pre_hook(self._before, with_kwargs=True)

    @property
    def num_rows(self) -> int:
        """Rows in host memory."""
        return len(self._rows)

    def prepare(self, sigmas: Tensor) -> None:
        """Compute the rows of `sigmas` [S] that are not there; the weights visit the device once."""
        wanted = dict.fromkeys(self._keys(sigmas))
        missing = [key for key in wanted if key not in self._rows]
        if not missing:
            return
        if len(self._rows) + len(missing) > MAX_ROWS:
            self._rows = {}
            missing = list(wanted)
        found = self._compute(missing)
        self._rows.update(zip(missing, found.unbind(), strict=True))

    @contextmanager
    def of(self, sigmas: Tensor) -> Iterator[None]:
        """Within, forwards use the rows of `sigmas` [B], a tensor on the CPU so that nobody waits."""
        self._select(sigmas)
        self._is_selected = True
        try:
            yield
        finally:
            self._is_selected = False

    def _select(self, sigmas: Tensor) -> None:
        self.prepare(sigmas)
        rows = [self._rows[key] for key in self._keys(sigmas)]
        current = self._current.get(len(rows))
        if current is None:  # stays where it is: CUDA graphs know it by address
            shape = len(self._layers), len(rows), self._layers[0].out_features
            current = self._current[len(rows)] = torch.empty(shape, dtype=self._dtype, device=self._device)
        for layer, part in zip(self._layers, current.unbind(), strict=True):
            layer.current = part
        for index, row in enumerate(rows):
            current[:, index].copy_(row, non_blocking=True)

    def _before(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """What nobody selected for (validation pictures) is selected here."""
        if not self._is_selected:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[3]
            self._select(timestep.cpu())

    def drop_weights(self) -> None:
        """Forget the weights; rows of other sigmas than those there are cannot be computed any more."""
        for layer in self._layers:
            layer.weight_there = layer.bias_there = None

    def _visiting_weights(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each layer on the device, the next ones on their way through pinned memory."""
        pinned: list[Tensor] = []
        done = [torch.cuda.Event(), torch.cuda.Event()] if self._device.type == "cuda" else []
        for index, layer in enumerate(self._layers):
            weight, bias = layer.weight_there, layer.bias_there
            if weight is None:
                raise ValueError(
                    "The modulation's weights were dropped; it cannot be computed for new sigmas."
                )
            bias = None if bias is None else bias.to(self._device)
            if weight.device == self._device or not done:
                yield weight.to(self._device), bias
                continue
            if len(pinned) < 2:
                pinned.append(torch.empty_like(weight, device="cpu", pin_memory=True))
            done[index % 2].synchronize()
            staged = pinned[index % 2].copy_(weight)
            there = staged.to(self._device, non_blocking=True)
            done[index % 2].record()
            yield there, bias

    def _keys(self, sigmas: Tensor) -> list[float]:
        rounded: list[float] = sigmas.to(self._dtype).tolist()
        return rounded

    @torch.no_grad()
    def _compute(self, sigmas: Sequence[float]) -> Tensor:
        """[S, N, 6 D] in host memory."""
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        inputs = []
        for sigma in sigmas:
            timestep = torch.tensor([sigma], device=self._device, dtype=self._dtype)
            inputs.append(silu(self._embed(timestep, like, None)))
        shape = len(sigmas), len(self._layers), self._layers[0].out_features
        found = torch.empty(shape, dtype=self._dtype, pin_memory=self._device.type == "cuda")
        for index, (weight, bias) in enumerate(self._visiting_weights()):
            found[:, index].copy_(torch.cat([linear(x, weight, bias) for x in inputs]))
        return found


def can_tabulate(transformer: Any) -> bool:
    """Whether the modulation is a function of the timestep alone, and frozen but for a plain adapter."""
    if transformer.config.zero_cond_t or transformer.config.use_additional_t_cond:
        return False
    if any(parameter.requires_grad for parameter in transformer.time_text_embed.parameters()):
        return False
    bases = [_base_of(getattr(block, name)[1]) for block in transformer.transformer_blocks for name in LAYERS]
    return all(type(base) is nn.Linear and not base.weight.requires_grad for base in bases)


def _base_of(module: Any) -> Any:
    if not hasattr(module, "base_layer"):
        return module
    if not isinstance(module, LoraLayer) or module.lora_magnitude_vector:
        return None  # these adapters (LoKr, DoRA) need the weight itself
    return module.base_layer


def _replace(block: Any, name: str) -> TabulatedLinear:
    """Put a `TabulatedLinear` in the place of a block's layer, or under its adapter."""
    layer = getattr(block, name)[1]
    base = _base_of(layer)
    if type(base) is not nn.Linear or base.weight.requires_grad:
        raise ValueError(f"{name}.1 is trained, or no plain linear layer: its values cannot be tabulated.")
    tabulated = TabulatedLinear(base)
    if base is layer:
        getattr(block, name)[1] = tabulated
    else:
        layer.base_layer = tabulated
    return tabulated
