"""Few-step presets: a published distilled LoRA with the schedule and the guidance that it was made for.

A distilled LoRA draws in four or eight steps without guidance what the model draws in fifty with it, with
less variety and weaker small text, as its authors say. Its schedule is shifted by 3 at every resolution and
is not stretched to a terminal sigma.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from diffusers import FlowMatchEulerDiscreteScheduler

from .adapters import Source, attach_lora, open_lora

ADAPTER_NAME = "preset"
Call = TypeVar("Call", bound=Callable[..., Any])

# "shift 3" of the distillation as a resolution shift that is the same for every number of tokens.
DISTILLED_SCHEDULE: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A distilled LoRA and what goes with it.

    Attributes:
        repository: on Hugging Face.
        weight_name: its file.
        num_inference_steps: steps that it was distilled for.
        true_cfg_scale: guidance; 1 is none.
    """

    repository: str
    weight_name: str
    num_inference_steps: int
    true_cfg_scale: float = 1.0


PRESETS = {
    "lightning-8": Preset(
        repository="lightx2v/Qwen-Image-Lightning",
        weight_name="Qwen-Image-Lightning-8steps-V2.0-bf16.safetensors",
        num_inference_steps=8,
    ),
    "lightning-4": Preset(
        repository="lightx2v/Qwen-Image-Lightning",
        weight_name="Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors",
        num_inference_steps=4,
    ),
}


class PresetMixin:
    """`use_preset` of the pipelines."""

    _preset: Preset | None = None
    _scheduler_before: Any = None

    def use_preset(self, name: str | None, *, source: Source | None = None, **loading: Any) -> None:
        """Draw in few steps from now on: load a distilled LoRA, set its schedule, steps and guidance.

        `num_inference_steps` and `true_cfg_scale` of a call still win where they are given. The adapter is
        called "preset" and works beside others.

        Args:
            name: "lightning-8", "lightning-4", or None for the pipeline as it was.
            source: the LoRA's file, folder, repository or state dict, instead of the published one.
            loading: weight_name, subfolder, revision, local_files_only, as in `load_lora_weights`.

        Raises:
            ValueError: if there is no such preset, or the LoRA does not fit.
        """
        if name is not None and name not in PRESETS:
            raise ValueError(
                f"There is no preset {name!r}. Choose one of {', '.join(sorted(PRESETS))}, or None."
            )
        pipe = cast(Any, self)
        self._leave_preset()
        if name is None:
            return
        preset = PRESETS[name]
        if source is None:
            loading = {"weight_name": preset.weight_name, **loading}
        file = open_lora(preset.repository if source is None else source, **loading)
        attach_lora(pipe.transformer, file, adapter_name=ADAPTER_NAME, strength=1.0, pipeline=pipe)
        self._scheduler_before = pipe.scheduler
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(DISTILLED_SCHEDULE)
        self._preset = preset

    def _take_preset(self, other: Any) -> None:
        """Go on with the preset of a pipeline over the same transformer and scheduler."""
        pipe = cast(Any, self)
        preset = getattr(other, "_preset", None)
        if preset is not None and (pipe.transformer, pipe.scheduler) == (other.transformer, other.scheduler):
            self._preset, self._scheduler_before = preset, other._scheduler_before

    def _leave_preset(self) -> None:
        if self._preset is None:
            return
        pipe = cast(Any, self)
        adapters = set(getattr(pipe.transformer, "peft_config", {}))
        if adapters == {ADAPTER_NAME}:
            pipe.unload_lora_weights()
        elif ADAPTER_NAME in adapters:
            pipe.delete_adapters(ADAPTER_NAME)
        pipe.scheduler = self._scheduler_before
        self._preset = self._scheduler_before = None


def with_preset(call: Call) -> Call:
    """A pipeline's `__call__` whose steps and guidance are the preset's where they are not given."""
    signature = inspect.signature(call)

    @wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        preset: Preset | None = self._preset
        if preset is not None:
            given = signature.bind_partial(self, *args, **kwargs).arguments
            for name in ("num_inference_steps", "true_cfg_scale"):
                if name not in given:
                    kwargs[name] = getattr(preset, name)
        return call(self, *args, **kwargs)

    return cast(Call, called)
