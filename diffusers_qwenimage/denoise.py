"""The denoising loop: one for every member of the Qwen-Image family.

Every task is the same walk from noise to a picture with a few optional conditions, named by what they do:

| task | reference | keep | control | start |
|---|---|---|---|---|
| text-to-image | | | | noise |
| image-to-image | | | | picture mixed with noise, later sigma |
| inpaint | | yes | | mixed |
| edit, edit-plus (n images) | yes | | | noise |
| edit-inpaint | yes | yes | | mixed |
| layered | yes | | | noise for layers + 1 pictures |
| controlnet, controlnet-inpaint | | | yes | noise |

reference: clean tokens appended to the picture's. keep: a region imposed after each step. control: residuals
added to the blocks.

Flow matching (arXiv 2210.02747): the latents at sigma are (1 - sigma) picture + sigma noise, the
model predicts the velocity noise - picture, and a step follows it to the next sigma.

Shapes: B pictures, L image tokens, C = 4 z channels of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from .graphs import ModelCall, forward, graphs_of, signature_of
from .kernels import backend
from .precompile import compile_transformer, finish
from .prompt import pad
from .rotary import ImageShape
from .step_cache import Forecast, ForecastCache
from .transformer import ModulationTable, QwenImageTransformer2DModel

FEWEST_STEPS_TO_TABULATE = 4
PromptEmbeds = Sequence[Tensor]  # one tensor [T_i, joint_attention_dim] per picture


@dataclass(frozen=True, kw_only=True)
class KeepRegion:
    """Inpainting: after each step, `clean` at the current noise level replaces what the mask protects.

    Attributes:
        mask: [B, L, C], 1 where the picture may change, 0 where it is kept.
        clean: [B, L, C], the packed latents to keep.
        noise: [B, L, C], the noise that the loop started from.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class Control:
    """ControlNet: a model that turns a control picture into residuals of the blocks.

    Attributes:
        model: a QwenImageControlNetModel.
        condition: its packed control latents [B, L, channels].
        scales: strength at each step; 0 outside of the range where it acts.
    """

    model: torch.nn.Module
    condition: Tensor
    scales: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class DenoiseInputs:
    """Everything that the loop needs; what `prepare` functions return.

    Attributes:
        latents: where to start, [B, L, C].
        timesteps: of the scheduler, falling, [S].
        prompt: text embeddings, one [T_i, joint_attention_dim] per picture, without padding.
        image_shapes: (1, rows, columns) of the picture, then of each reference.
        negative: text embeddings to guide away from; None switches guidance off.
        guidance_scale: how far to guide; 1 is no guidance.
        rescale_guidance: give the guided velocity of each token the length of the conditional one.
        guidance_interval: part of the steps in which guidance acts, as fractions; outside of it the negative
            prompt costs nothing (arXiv 2404.07724).
        step_cache: when velocities are forecast instead of computed.
        reference: clean packed latents appended to the picture's tokens, [B, tokens, C].
        keep: region to keep.
        control: block residuals.
        additional_t_cond: [B], see the transformer.
        attention_kwargs: see the transformer.
    """

    latents: Tensor
    timesteps: Tensor
    prompt: PromptEmbeds
    image_shapes: Sequence[ImageShape]
    negative: PromptEmbeds | None = None
    guidance_scale: float = 1.0
    rescale_guidance: bool = True
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    step_cache: ForecastCache | None = None
    reference: Tensor | None = None
    keep: KeepRegion | None = None
    control: Control | None = None
    additional_t_cond: Tensor | None = None
    attention_kwargs: dict[str, Any] = field(default_factory=dict)


# Called after each step with (index, timestep, latents, prompt); returns the last two, changed or not.
OnStep = Callable[[int, Tensor, Tensor, PromptEmbeds], tuple[Tensor, PromptEmbeds]]


@torch.no_grad()
def denoise(
    transformer: Any,
    scheduler: Any,
    inputs: DenoiseInputs,
    *,
    on_step: OnStep | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Walk the latents down the schedule and return them, [B, L, C].

    Args:
        transformer: the package's transformer, or diffusers' own.
        scheduler: a flow-matching scheduler whose timesteps are set (`schedule.set_timesteps`).
        inputs: where to start and what to condition on.
        on_step: see `OnStep`.
        interrupted: asked before each step; True ends the loop with the latents as they are.
    """
    finish(compile_transformer(transformer, inputs.latents.device))
    predict = _predictor(transformer, inputs)
    latents, prompt = inputs.latents, inputs.prompt
    for index, timestep in enumerate(inputs.timesteps):
        if interrupted():
            break
        velocity = predict(index, latents, prompt)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if inputs.keep is not None:
            latents = _impose(scheduler, inputs.keep, inputs.timesteps[index + 1 : index + 2], latents)
        if on_step is not None:
            latents, prompt = on_step(index, timestep, latents, prompt)
    return latents


def guide(conditional: Tensor, unconditional: Tensor, scale: float, *, rescale: bool = True) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), of velocities [B, L, C].

    `rescale` gives each token's velocity the norm of the conditional one, as Qwen-Image is sampled.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return guided
    norm = torch.norm(conditional, dim=-1, keepdim=True)
    rescaled: Tensor = guided * (norm / torch.norm(guided, dim=-1, keepdim=True))
    return rescaled


def _predictor(transformer: Any, inputs: DenoiseInputs) -> Callable[[int, Tensor, PromptEmbeds], Tensor]:
    """A function (index, latents, prompt) -> guided velocity [B, L, C], for this model and these inputs."""
    model = transformer._orig_mod if is_compiled_module(transformer) else transformer
    ours = isinstance(model, QwenImageTransformer2DModel)
    is_compiled = model is not transformer
    sigmas = inputs.timesteps.to(inputs.latents.dtype) / 1000
    kind = inputs.additional_t_cond
    table = _modulation_table(model, sigmas, inputs, is_compiled=is_compiled) if ours else None
    graphs = graphs_of(model) if ours and not is_compiled else None

    def call(index: int, tokens: Tensor, text: PromptEmbeds, residuals: Sequence[Tensor] | None) -> Tensor:
        copies = len(text) // tokens.shape[0]  # 2 if both branches of the guidance go together
        one = ModelCall(
            hidden_states=_repeat(tokens, copies),
            text=text,
            timestep=sigmas[index].expand(len(text)),
            image_shapes=inputs.image_shapes,
            residuals=[_repeat(residual, copies) for residual in residuals or ()],
            kind=None if kind is None else _repeat(kind, copies),
            modulation=None if table is None else table.at(index),
            attention_kwargs=inputs.attention_kwargs,
        )
        if graphs is not None:
            velocity = graphs(model, one)
        else:
            velocity = forward(transformer, one, is_padded=not ours)
        return velocity[:, : inputs.latents.shape[1]]

    branches = _Branches(inputs)

    def compute(index: int, latents: Tensor, texts: dict[str, PromptEmbeds]) -> dict[str, Tensor]:
        """The velocity of each branch that is asked for, in one pass where the model allows it."""
        residuals = _residuals(inputs, index, sigmas[index], latents, branches.prompt)
        tokens = latents if inputs.reference is None else torch.cat([latents, inputs.reference], dim=1)
        if len(texts) > 1 and ours and not model.is_cache_enabled:
            # Every weight is read once per step.
            samples = [sample for text in texts.values() for sample in text]
            together = call(index, tokens, samples, residuals)
            return dict(zip(texts, together.chunk(len(texts)), strict=True))
        velocities = {}
        for name, text in texts.items():
            with transformer.cache_context(name):  # a step cache of diffusers decides for each branch
                velocities[name] = call(index, tokens, text, residuals)
        return velocities

    def predict(index: int, latents: Tensor, prompt: PromptEmbeds) -> Tensor:
        texts = branches.at(index, prompt)
        asked = {name: text for name, text in texts.items() if branches.must_compute(name, index)}
        computed = compute(index, latents, asked) if asked else {}
        velocities = branches.complete(index, computed, texts)
        if "uncond" not in velocities:
            return velocities["cond"]
        return guide(
            velocities["cond"],
            velocities["uncond"],
            inputs.guidance_scale,
            rescale=inputs.rescale_guidance,
        )

    return predict


def _modulation_table(
    model: QwenImageTransformer2DModel, sigmas: Tensor, inputs: DenoiseInputs, *, is_compiled: bool
) -> ModulationTable | None:
    """The modulation of all steps, where its weights are elsewhere or that is quicker; else None."""
    kind = inputs.additional_t_cond
    if not model.modulation_is_offloaded and (
        is_compiled or kind is not None or not _pays_to_tabulate(model, len(sigmas))
    ):
        return None
    one_kind = None if kind is None else kind[:1]  # a table is of one, and all pictures are of the same
    return model.tabulate_modulation(sigmas, dtype=inputs.latents.dtype, additional_t_cond=one_kind)


def _pays_to_tabulate(model: QwenImageTransformer2DModel, num_steps: int) -> bool:
    """Whether the modulation is computed for all steps at once though its weights are at hand.

    A step reads a third of all weights for it, and all steps at once as much, launched on their own.
    """
    weight = model.img_in.weight
    if num_steps < FEWEST_STEPS_TO_TABULATE or backend(weight.device).name == "off":
        return False
    return signature_of(model) is not None  # no hooks that move weights when a block is called


class _Branches:
    """Which branches of the guidance a step has, and which of them are computed and which forecast."""

    def __init__(self, inputs: DenoiseInputs) -> None:
        self.prompt: PromptEmbeds = inputs.prompt
        self._inputs = inputs
        self._num_steps = len(inputs.timesteps)
        self._forecasts: dict[str, Forecast] = {}
        self._sigmas: list[float] = []
        if inputs.step_cache is not None:
            self._sigmas = (inputs.timesteps.double() / 1000).tolist()
            self._forecasts = {name: Forecast(config=inputs.step_cache) for name in ("cond", "uncond")}

    def at(self, index: int, prompt: PromptEmbeds) -> dict[str, PromptEmbeds]:
        """The text of each branch that step `index` has."""
        if prompt is not self.prompt or self._control_changes(index):
            for forecast in self._forecasts.values():
                forecast.forget()
        self.prompt = prompt
        negative = self._inputs.negative
        if negative is None or not guidance_acts(index, self._num_steps, self._inputs.guidance_interval):
            return {"cond": prompt}
        return {"cond": prompt, "uncond": negative}

    def must_compute(self, name: str, index: int) -> bool:
        """Whether the transformer has to run for a branch."""
        forecast = self._forecasts.get(name)
        return forecast is None or forecast.must_compute(index, self._num_steps, self._sigmas[index])

    def complete(
        self, index: int, computed: dict[str, Tensor], texts: dict[str, PromptEmbeds]
    ) -> dict[str, Tensor]:
        """The velocities of all branches of a step, from those that were computed."""
        if not self._forecasts:
            return computed
        sigma = self._sigmas[index]
        for name, velocity in computed.items():
            self._forecasts[name].record(sigma, velocity)
        return {
            name: computed[name] if name in computed else self._forecasts[name].forecast(sigma)
            for name in texts
        }

    def _control_changes(self, index: int) -> bool:
        control = self._inputs.control
        return control is not None and index > 0 and control.scales[index] != control.scales[index - 1]


def guidance_acts(index: int, num_steps: int, interval: tuple[float, float]) -> bool:
    """Whether step `index` of `num_steps` lies in the interval, as ControlNet's start and end are counted."""
    start, end = interval
    return index / num_steps >= start and (index + 1) / num_steps <= end


def _residuals(
    inputs: DenoiseInputs, index: int, sigma: Tensor, latents: Tensor, prompt: PromptEmbeds
) -> Sequence[Tensor] | None:
    """The ControlNet's block residuals; both branches of the guidance use those of the positive prompt."""
    if inputs.control is None:
        return None
    embeds, mask = pad(prompt)
    residuals: Sequence[Tensor] = inputs.control.model(
        hidden_states=latents,
        controlnet_cond=inputs.control.condition,
        conditioning_scale=inputs.control.scales[index],
        timestep=sigma.expand(latents.shape[0]),
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        img_shapes=[list(inputs.image_shapes)] * latents.shape[0],
        return_dict=False,
    )
    return residuals


def _repeat(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else torch.cat([tensor] * copies)


def _impose(scheduler: Any, keep: KeepRegion, next_timestep: Tensor, latents: Tensor) -> Tensor:
    """Put the kept region back, noised to the next timestep (not at all after the last step)."""
    clean = keep.clean
    if len(next_timestep):
        clean = scheduler.scale_noise(clean, next_timestep, keep.noise)
    return (1 - keep.mask) * clean + keep.mask * latents
