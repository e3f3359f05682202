"""Speed of a pipeline: one call that chooses for the machine, and the switches behind it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from diffusers_qwenimage.graphs import LAUNCH_BOUND, graphs_of, signature_of
from diffusers_qwenimage.kernels import backend
from diffusers_qwenimage.precompile import call_once, compile_both, finish
from diffusers_qwenimage.step_cache import ForecastCache
from diffusers_qwenimage.transformer import QwenImageTransformer2DModel

logger = logging.getLogger(__name__)

GIB = 2**30
WORKING_MEMORY = 8 * GIB  # beside the weights, for the activations and for decoding a picture of 1328x1328
TOKENS = 4224  # of the attention that is timed: a picture of 1024x1024 and 128 tokens of text
CALLS = 8  # in a row, so that launching one hides behind the one before
WORTH_IT = 0.97  # another attention backend must take less than this share of the default's time
# Exact backends; those that fetch kernels from the Hub or round to 8 bits are for `set_attention_backend`.
ATTENTION_BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
# What a device may answer when it cannot run one.
BACKEND_ERRORS = (RuntimeError, ValueError, TypeError, ImportError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One thing that `optimize` decided."""

    part: str
    chosen: str
    reason: str


@dataclass(kw_only=True)
class Choices:
    """What `optimize` chose and why; printed as a table."""

    choices: list[Choice] = field(default_factory=list)

    def add(self, part: str, chosen: str, reason: str) -> None:
        """Note one."""
        self.choices.append(Choice(part=part, chosen=chosen, reason=reason))

    def __getitem__(self, part: str) -> Choice:
        return next(choice for choice in self.choices if choice.part == part)

    def __str__(self) -> str:
        widths = [
            max((len(getattr(c, name)) for c in self.choices), default=0) for name in ("part", "chosen")
        ]
        return "\n".join(
            f"{c.part:{widths[0]}}  {c.chosen:{widths[1]}}  {c.reason}".rstrip() for c in self.choices
        )

    __repr__ = __str__


class SpeedMixin:
    """`optimize` and its parts, for the pipelines."""

    step_cache: ForecastCache | None = None

    def optimize(
        self,
        *,
        weights: str | None = None,
        text_encoder: str | None = None,
        graphs: str = "auto",
        attention: str | None = None,
        modulation: str = "auto",
        step_cache: ForecastCache | None = None,
    ) -> Choices:
        """Choose for this machine what makes the pipeline fast, set it, and say what was chosen and why.

        Call it after `.to(device)` and before LoRAs are loaded or weights streamed. The transformer's weights
        are frozen. Without arguments all of it is exact to rounding. On a GPU, kernels are compiled and
        libraries loaded here, so that the first picture takes about as long as the next ones.

        Args:
            weights: "fp8", "int8" or "fp8-storage" quantises the transformer; None keeps its type.
            text_encoder: likewise for the language model of the text encoder.
            graphs: CUDA graphs: "auto" where launching takes the time, "on", or "off".
            attention: an attention backend of diffusers; the fastest exact one is looked for if None.
            modulation: "resident" keeps the modulation weights on the device; "tabulated" moves them to host
                memory and tabulates what they give before each run; "auto" decides by the memory there is.
            step_cache: forecast part of the steps, see `enable_step_cache`.

        Returns:
            The choices; `print` shows them as a table.

        Raises:
            ValueError: for an unknown value, or where the order of calls makes a choice impossible.
        """
        if modulation not in ("auto", "resident", "tabulated"):
            raise ValueError(f"modulation can be auto, resident or tabulated, not {modulation!r}.")
        pipe = cast(Any, self)
        transformer, chosen = pipe.transformer, Choices()
        if text_encoder is not None:
            _quantize_text_encoder(pipe, text_encoder, chosen)
        if isinstance(transformer, QwenImageTransformer2DModel):
            _choose_weights(transformer, weights, chosen)
            _choose_kernels(transformer, chosen)
            _choose_attention(transformer, attention, chosen)
            _choose_modulation(pipe, modulation, chosen)
            _choose_graphs(transformer, graphs, chosen)
        else:
            name = f"{type(transformer).__module__}.{type(transformer).__qualname__}"
            chosen.add("transformer", "as it is", f"it is a {name}, not the package's own")
        _choose_autoencoder(pipe.vae, chosen)
        if isinstance(transformer, QwenImageTransformer2DModel):
            _warm_up(pipe, chosen)
        self.step_cache = step_cache
        chosen.add(
            "step cache",
            "off" if step_cache is None else f"threshold {step_cache.threshold:g}",
            "every step is computed" if step_cache is None else "steps are forecast while they may be",
        )
        for choice in chosen.choices:
            logger.info("%s: %s (%s)", choice.part, choice.chosen, choice.reason)
        return chosen

    def enable_step_cache(self, cache: ForecastCache | None = None) -> None:
        """Forecast velocities instead of computing them where the forecast is good enough (not exact).

        Args:
            cache: when; `ForecastCache()` if None.
        """
        self.step_cache = cache or ForecastCache()

    def disable_step_cache(self) -> None:
        """Compute every step."""
        self.step_cache = None

    def release_graphs(self) -> None:
        """Free the CUDA graphs of the transformer and their memory; new ones are recorded when they pay."""
        graphs_of(cast(Any, self).transformer).release()


def _choose_weights(transformer: QwenImageTransformer2DModel, kind: str | None, chosen: Choices) -> None:
    from diffusers_qwenimage.quantize import is_quantized, quantize_

    if kind is None:
        name = "8 bits" if is_quantized(transformer) else str(transformer.dtype).removeprefix("torch.")
        chosen.add("weights", name, "as loaded" + _advice(transformer))
        return
    chosen.add("weights", kind, _quantize(transformer, lambda: quantize_(transformer, kind)))


def _advice(transformer: QwenImageTransformer2DModel) -> str:
    """What quantising would do here."""
    from diffusers_qwenimage.kernels.rows import has_fp8_products
    from diffusers_qwenimage.quantize import is_quantized

    device = transformer.img_in.weight.device
    if device.type != "cuda" or is_quantized(transformer):
        return ""
    kind = "fp8" if has_fp8_products(device) else "int8"
    return f"; weights={kind!r} would take half the memory and less time, with small errors"


def _quantize_text_encoder(pipe: Any, kind: str, chosen: Choices) -> None:
    from diffusers_qwenimage.quantize import quantize_

    encoder = pipe.text_encoder
    if encoder is None:
        raise ValueError("This pipeline has no text encoder to quantise; leave text_encoder out.")
    # Text prompts use neither the output layer nor the vision tower.
    reason = _quantize(encoder, lambda: quantize_(encoder, kind, skip=("lm_head", "visual")))
    pipe.clear_prompt_cache()
    chosen.add("text encoder", kind, reason)


def _quantize(module: Any, run: Callable[[], list[str]]) -> str:
    """What quantising a model did."""
    before = module.get_memory_footprint()
    names = run()
    after = module.get_memory_footprint()
    unit, name = (GIB, "GiB") if before >= GIB else (2**20, "MiB")
    reason = f"{len(names)} layers in 8 bits, {before / unit:.1f} to {after / unit:.1f} {name}; not exact"
    slower = next(module.parameters()).device.type != "cuda"
    return f"{reason}, and slower without a GPU" if slower else reason


def _choose_kernels(transformer: QwenImageTransformer2DModel, chosen: Choices) -> None:
    from diffusers_qwenimage.projections import fuse_

    found = backend(transformer.img_in.weight.device)
    if found.name == "off":
        chosen.add("kernels", "plain torch", found.reason)
        return
    transformer.requires_grad_(False)  # weights that are trained keep their memory
    groups = fuse_(transformer)
    chosen.add("kernels", "fused path", f"{found.reason}; {groups} groups of q, k, v are one product each")


def _choose_attention(transformer: QwenImageTransformer2DModel, wanted: str | None, chosen: Choices) -> None:
    weight = transformer.img_in.weight
    if wanted is not None:
        transformer.set_attention_backend(wanted)
        chosen.add("attention", wanted, "asked for")
        return
    if weight.device.type != "cuda" or weight.dtype.itemsize > 2:
        chosen.add(
            "attention", "native", f"torch chooses; nothing to compare for {weight.dtype} on {weight.device}"
        )
        return
    config = transformer.config
    times = attention_times(
        config.num_attention_heads, config.attention_head_dim, device=weight.device, dtype=weight.dtype
    )
    if "native" not in times:
        chosen.add("attention", "native", "torch chooses; it could not be timed here")
        return
    best = min(times, key=times.__getitem__)
    if times[best] > WORTH_IT * times["native"]:
        best = "native"
    transformer.set_attention_backend(best)
    listed = ", ".join(f"{name} {time:.2f}" for name, time in sorted(times.items(), key=lambda item: item[1]))
    chosen.add("attention", best, f"ms for {TOKENS} tokens: {listed}")


def attention_times(
    num_heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Milliseconds of the exact attention backends that run here, on views of a joint buffer as in blocks.

    Raises:
        torch.OutOfMemoryError: if the device has no room for the attention of a picture of 1024x1024.
    """
    qkv = torch.randn(1, TOKENS, 3, num_heads, head_dim, device=device, dtype=dtype)

    def attend(name: str) -> Tensor:
        query, key, value = qkv.unbind(2)
        if not name.lstrip("_").startswith("native"):  # they want memory without gaps
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        result: Tensor = dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))
        return result

    times = {}
    for name in ATTENTION_BACKENDS:
        try:
            attend(name)
        except torch.OutOfMemoryError:  # says nothing about the backend
            raise
        except BACKEND_ERRORS as error:
            logger.info("Attention backend %s: %s", name, error)
            continue
        times[name] = _milliseconds(partial(attend, name), device)
    return times


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call: the best of a few rows of calls, since only delays make one slower."""
    times: list[float] = []
    with torch.cuda.device(device):  # events are recorded on the current one
        for _ in range(CALLS):  # warm-up: kernels are loaded and plans made
            run()
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                run()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / CALLS)
    return min(times)


def _choose_modulation(pipe: Any, wanted: str, chosen: Choices) -> None:
    transformer: QwenImageTransformer2DModel = pipe.transformer
    device = transformer.img_in.weight.device
    reason = "asked for"
    if wanted == "auto":
        wanted, reason = "resident", f"it is where the rest is, on {device}"
        if device.type == "cuda":
            wanted, reason = _by_memory(transformer, *torch.cuda.mem_get_info(device))
    if wanted == "tabulated" and device.type == "cpu":
        wanted, reason = "resident", "the model is in host memory already"
    if wanted == "tabulated":
        transformer.offload_modulation("cpu")
    elif transformer.modulation_is_offloaded:
        transformer.load_modulation()
    chosen.add("modulation", wanted, reason)


def _by_memory(transformer: QwenImageTransformer2DModel, free: int, total: int) -> tuple[str, str]:
    """Whether the modulation stays on a device with so many bytes free."""
    held = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in transformer.named_parameters()
        if tensor.device.type == "cpu" and (".img_mod." in name or ".txt_mod." in name)
    )
    left = free - held
    if left >= WORKING_MEMORY:
        return "resident", f"{left / GIB:.1f} GiB of {total / GIB:.1f} are left beside it"
    return (
        "tabulated",
        f"only {max(left, 0) / GIB:.1f} GiB would be left beside it: its weights are in host memory",
    )


def _choose_graphs(transformer: QwenImageTransformer2DModel, mode: str, chosen: Choices) -> None:
    graphs = graphs_of(transformer)
    graphs.mode = mode
    device = transformer.img_in.weight.device
    if mode == "off":
        chosen.add("CUDA graphs", "off", "asked for")
    elif device.type != "cuda" or backend(device).name == "off":
        chosen.add("CUDA graphs", "off", "they need an NVIDIA GPU and the fused path")
    elif mode == "on":
        chosen.add("CUDA graphs", "on", "every shape is recorded at its second step")
    else:
        chosen.add(
            "CUDA graphs",
            "auto",
            f"a shape is recorded when launching takes {LAUNCH_BOUND:.0%} of its second step or more",
        )


def _warm_up(pipe: Any, chosen: Choices) -> None:
    """Compile kernels and load libraries now, and not in the first picture."""
    transformer: QwenImageTransformer2DModel = pipe.transformer
    device = transformer.img_in.weight.device
    if device.type != "cuda" or signature_of(transformer) is None:  # hooks may move weights
        return
    start = time.perf_counter()
    compiling = compile_both(transformer, pipe.vae, device)
    finish(compiling)
    compiled = time.perf_counter()
    call_once(transformer, pipe.vae)
    if pipe.text_encoder is not None and pipe.text_encoder.device == device:
        pipe.encode_prompt(" ")  # the usual negative prompt: it is remembered
    torch.cuda.synchronize(device)
    end = time.perf_counter()
    reason = f"{compiled - start:.1f} s (on disk for next time), first calls in {end - compiled:.1f} s"
    chosen.add("warm-up", "done", f"{len(compiling)} kernels compiled in {reason}")


def _choose_autoencoder(vae: Any, chosen: Choices) -> None:
    if vae is None:
        return
    from diffusers_qwenimage.vae import AutoencoderKLQwenImage

    if not isinstance(vae, AutoencoderKLQwenImage):
        chosen.add("autoencoder", "as it is", f"it is a {type(vae).__name__} of {type(vae).__module__}")
        return
    weight = next(vae.decoder.parameters())
    with torch.no_grad():
        sample = torch.empty(1, vae.config.z_dim, 1, 1, 1, device=weight.device, dtype=weight.dtype)
        reason = vae.why_not_fused(sample)
    if reason is None:
        chosen.add("autoencoder", "fused path", "single images, channels last, no fp32 copies")
    else:
        chosen.add("autoencoder", "2-D convolutions", reason)
