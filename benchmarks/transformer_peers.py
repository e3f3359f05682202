"""The peers of `transformer.py` over its weights: what else computes this transformer, and how fast.

diffusers with the quickest attention it has here, and compiled block by block; torchao's float8 (scales per
row, activations quantised at run time); DiffSynth-Studio's own class; cache-dit. A peer that is not
installed, or does not run here, is skipped with a line that says why.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from arms import Arms, Note, compare, first, relative, timed
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from training_peers import diffsynth_module, over_weights_of, stock_of
from transformer_model import inputs_of, over_the_same, recorded, with_table

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.projections import fuse_
from diffusers_qwenimage.quantize import quantize_

Forward = Callable[..., Any]
# Of diffusers' registry; the first is what it takes by itself.
ATTENTION = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "sage")
EAGER = ("diffusers, quickest attention", "DiffSynth-Studio", "diffusers + torchao float8")
COMPILED = ("diffusers, compiled", "diffusers + torchao float8, compiled")
PEERS = (*EAGER, *COMPILED)
# How peers say that they do not run here: a package that is absent, an option or shape they refuse, a device
# without an operation (torch's NotImplementedError), checks of theirs. Always printed; ours is never caught.
REFUSALS = (ImportError, ValueError, RuntimeError, NotImplementedError, AssertionError)


def compare_peers(
    ours: QwenImageTransformer2DModel, side: int, repeats: int, note: Note, wanted: Sequence[str]
) -> None:
    """One forward of one picture by each of the peers, and by ours in bf16 and in fp8.

    Those that compile come last, in turn with ours once more. The first call of a peer is noted too, in
    seconds: what is compiled is compiled in it.
    """
    one = inputs_of(ours, side)
    peers = Peers(ours)
    with torch.no_grad():
        mine = _our_arms(ours, one)
        expected: Tensor | None = None
        for names in (("diffusers", *(name for name in wanted if name in EAGER)), COMPILED):
            group = f"{side}x{side} forward beside {'eager' if 'diffusers' in names else 'compiled'} peers"
            arms: Arms = dict(mine)
            for name, forward in peers.forwards([name for name in names if name in ("diffusers", *wanted)]):
                arm = functools.partial(forward, **one)
                try:
                    seconds, (got, *_) = first(arm)
                except REFUSALS as error:
                    skip(name, error)
                    continue
                expected = got if expected is None else expected
                note(f"{group}, {name}: first call", seconds, "s")
                note(f"{group}, {name}: relative difference to diffusers", relative(got, expected), "")
                arms[name] = arm
            if len(arms) > len(mine):
                compare(arms, repeats, note, group)


def _our_arms(ours: QwenImageTransformer2DModel, one: dict[str, Any]) -> Arms:
    """bf16 and fp8; fp8 as a CUDA graph too, which pipelines record where launching takes the time."""
    quantized = over_the_same(ours)
    quantize_(quantized, "fp8")
    fuse_(quantized)
    tabulated = with_table(quantized, one)
    arms: Arms = {
        "ours, modulation tabulated": with_table(ours, one),
        "ours, fp8, modulation tabulated": tabulated,
    }
    if recording := recorded(tabulated):
        arms["ours, fp8, modulation tabulated, CUDA graph"] = recording[0].replay
    return arms


class Peers:
    """What computes the transformer of ours besides, over its weights; made when it is asked for.

    A forward takes the arguments of diffusers' forward.
    """

    def __init__(self, ours: QwenImageTransformer2DModel) -> None:
        self._ours = ours
        self._makers: dict[str, Callable[[], Forward]] = {
            "diffusers": lambda: self._eager,
            "diffusers, quickest attention": self._quickest_attention,
            "DiffSynth-Studio": self._diffsynth,
            "diffusers + torchao float8": lambda: self._float8,
            # From here on these two are no longer eager.
            "diffusers, compiled": lambda: _compiled(self._eager),
            "diffusers + torchao float8, compiled": lambda: _compiled(self._float8),
        }

    def forwards(self, names: Sequence[str]) -> Iterator[tuple[str, Forward]]:
        """Those of these names that can be made here."""
        for name in names:
            try:
                yield name, self._makers[name]()
            except REFUSALS as error:
                skip(name, error)

    @functools.cached_property
    def _eager(self) -> Any:
        return stock_of(self._ours).eval()

    def _quickest_attention(self) -> Forward:
        """diffusers with the attention that is quickest at 1024x1024, of two runs each."""
        model, inputs = self._eager, inputs_of(self._ours, 1024 if torch.cuda.is_available() else 32)
        times = {}
        for name in ATTENTION:
            try:
                with attention_backend(name), torch.no_grad():
                    times[name] = min(timed(lambda: model(**inputs), 2))
            except REFUSALS as error:
                skip(f"diffusers, attention {name}", error)
        quickest = min(times, key=lambda name: times[name])
        print(f"diffusers' attention at 1024x1024, ms: {times}; quickest: {quickest}", flush=True)

        def forward(**arguments: Any) -> Any:
            with attention_backend(quickest):
                return model(**arguments)

        return forward

    @functools.cached_property
    def _float8(self) -> Any:
        """diffusers with all linear layers of the blocks, but the modulation, in torchao's float8."""
        from torchao.quantization import (  # type: ignore[import-not-found,unused-ignore]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
        )
        from torchao.quantization import quantize_ as torchao_quantize_

        def is_block_layer(module: nn.Module, name: str) -> bool:
            is_modulation = "img_mod." in name or "txt_mod." in name
            return isinstance(module, nn.Linear) and name.startswith("transformer_b") and not is_modulation

        # Inductor's exhaustive search, which torchao would switch on, takes minutes for these blocks.
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        model = stock_of(self._ours).eval()
        torchao_quantize_(model, config, filter_fn=is_block_layer)
        return model

    def _diffsynth(self) -> Forward:
        """DiffSynth-Studio's class; the loop over blocks is that of its `model_fn_qwen_image`."""
        ours = self._ours
        if ours.inner_dim != 3072:
            raise ValueError("DiffSynth-Studio's class has a fixed width of 3072.")
        with torch.device("meta"):
            model = diffsynth_module("models.qwen_image_dit").QwenImageDiT(num_layers=ours.config.num_layers)
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
        model = over_weights_of(ours, model.to(ours.dtype)).eval()

        def forward(
            *,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            timestep: Tensor,
            img_shapes: Any,
            **_: Any,
        ) -> tuple[Tensor]:
            lengths = [encoder_hidden_states.shape[1]] * len(encoder_hidden_states)
            image, text = model.img_in(hidden_states), model.txt_in(model.txt_norm(encoder_hidden_states))
            conditioning = model.time_text_embed(timestep.to(image.dtype), image.dtype)
            tables = model.pos_embed(list(img_shapes[0]), lengths, device=image.device)
            for block in model.transformer_blocks:
                text, image = block(image=image, text=text, temb=conditioning, image_rotary_emb=tables)
            return (model.proj_out(model.norm_out(image, conditioning)),)

        return forward


def _compiled(model: Any) -> Forward:
    """Regional compilation, as diffusers recommends it: one graph for all blocks."""
    model.compile_repeated_blocks()
    return functools.partial(model)


def skip(name: str, error: Exception) -> None:
    """Say which peer is missing, and why."""
    print(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)


@torch.no_grad()
def compare_step_caches(
    ours: QwenImageTransformer2DModel, side: int, num_steps: int, repeats: int, note: Note
) -> None:
    """All steps of a schedule without guidance: diffusers, the same with cache-dit at its defaults, and ours.

    cache-dit leaves out blocks in steps that it takes to be alike, so its result differs. With random weights
    the number of steps that it finds alike says nothing about pictures.
    """
    one = inputs_of(ours, side)
    stock = stock_of(ours).eval()
    tables = ours.tabulate_modulation(_sigmas(num_steps, ours.device)[:-1].bfloat16(), dtype=torch.bfloat16)

    def tabulated(step: int, **arguments: Any) -> Any:
        return ours(**arguments, modulation=tables.at(step))

    arms: Arms = {
        "diffusers": lambda: _denoise(lambda step, **x: stock(**x), one, num_steps),
        "ours, modulation tabulated": lambda: _denoise(tabulated, one, num_steps),
    }
    case = f"{side}x{side}, {num_steps} steps without guidance"
    try:
        arms["diffusers + cache-dit"] = cached = _with_cache_dit(ours, one, num_steps)
    except REFUSALS as error:
        skip("diffusers + cache-dit", error)
    else:
        exact = _denoise(lambda step, **x: stock(**x), one, num_steps)
        got, num_cached = cached()
        note(f"{case}, diffusers + cache-dit: relative difference to diffusers", relative(got, exact), "")
        note(f"{case}, diffusers + cache-dit: steps taken from the cache", num_cached, "steps")
    compare(arms, repeats, note, case)


def _with_cache_dit(
    ours: QwenImageTransformer2DModel, one: dict[str, Any], num_steps: int
) -> Callable[[], tuple[Tensor, int]]:
    """A run with cache-dit: the latents, and how many steps came from the cache."""
    import cache_dit  # type: ignore[import-not-found,unused-ignore]

    model = stock_of(ours).eval()
    config = cache_dit.DBCacheConfig(num_inference_steps=num_steps, enable_separate_cfg=False)
    cache_dit.enable_cache(model, cache_config=config)

    def run() -> tuple[Tensor, int]:
        cache_dit.refresh_context(model, num_inference_steps=num_steps)
        latents = _denoise(lambda step, **x: model(**x), one, num_steps)
        found = cache_dit.summary(model, logging=False)
        return latents, max((len(stats.cached_steps or []) for stats in found), default=0)

    return run


def _denoise(forward: Forward, one: dict[str, Any], num_steps: int) -> Tensor:
    latents: Tensor = one["hidden_states"]
    sigmas = _sigmas(num_steps, latents.device)
    for step in range(num_steps):
        timestep = sigmas[step : step + 1].to(latents.dtype)
        velocity: Tensor = forward(step=step, **{**one, "hidden_states": latents, "timestep": timestep})[0]
        latents = latents + (sigmas[step + 1] - sigmas[step]).to(latents.dtype) * velocity
    return latents


def _sigmas(num_steps: int, device: torch.device) -> Tensor:
    return torch.linspace(1, 0, num_steps + 1, device=device)
