"""What `end_to_end.py` compares: pipelines over one set of random weights of the true size, on the device."""

import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import diffusers
import torch
from training_peers import stock_of
from transformer_model import build, over_the_same
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from true_model import TEXT_CONFIG, VISION_CONFIG

from diffusers_qwenimage import (
    AutoencoderKLQwenImage,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    default_checkpoint,
)
from diffusers_qwenimage.checkpoint import empty_module
from diffusers_qwenimage.loading import load_scheduler
from diffusers_qwenimage.step_cache import ForecastCache

GUIDANCE = 4.0
NEGATIVE = " "
# Called after each step; the picture's side, steps, prompt, and that make a Pillow image.
OnStep = Callable[[], None]
Draw = Callable[[str, int, int, OnStep], Any]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Modules that all arms share; the two transformers lie in the same memory.

    Attributes:
        ours, stock: the package's transformer, and diffusers'.
        text_encoder, tokenizer: of the prompt.
        vae: diffusers' autoencoder.
        device: where all of them are.
    """

    ours: Any
    stock: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any
    device: str


def random_weights(blocks: int, layers: int, device: str) -> Weights:
    """At the published sizes, N(0, 0.02), norms 1; the embedded checkpoint's tokenizer."""
    ours, stock = build(blocks, device)
    torch.manual_seed(0)
    with torch.device(device):
        vae = diffusers.AutoencoderKLQwenImage().eval().requires_grad_(False).to(torch.bfloat16)
    return Weights(
        ours=ours,
        stock=stock,
        text_encoder=_random_text_encoder(layers, device),
        tokenizer=AutoTokenizer.from_pretrained(default_checkpoint() / "tokenizer"),
        vae=vae,
        device=device,
    )


def embedded_weights(device: str) -> Weights:
    """The embedded checkpoint, to try the script without a GPU."""
    pipe = diffusers.QwenImagePipeline.from_pretrained(str(default_checkpoint()), torch_dtype=torch.bfloat16)
    pipe.to(device)
    folder = str(default_checkpoint() / "transformer")
    ours = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    ours.eval().requires_grad_(False)
    return Weights(
        ours=ours,
        stock=stock_of(ours).eval(),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        vae=pipe.vae.requires_grad_(False),
        device=device,
    )


def ours_as_loaded(weights: Weights) -> Draw:
    """The package without any call that tunes it."""
    return _draw(_ours(weights, weights.ours))


def ours_optimized(weights: Weights) -> Draw:
    """The package after `pipe.optimize()`."""
    pipe = _ours(weights, weights.ours)
    print(pipe.optimize(), flush=True)
    return _draw(pipe)


def ours_quantized(weights: Weights, kind: str) -> Draw:
    """The package with the transformer's block linears in 8 bits."""
    pipe = _ours(weights, over_the_same(weights.ours))
    print(pipe.optimize(weights=kind), flush=True)
    return _draw(pipe)


def ours_every_second_step(weights: Weights) -> Draw:
    """The package with every second step forecast, whatever the error."""
    pipe = _ours(weights, over_the_same(weights.ours))
    pipe.optimize(step_cache=ForecastCache(every=2))
    return _draw(pipe)


def stock_eager(weights: Weights) -> Draw:
    """diffusers as it is."""
    return _draw(_stock(weights, weights.stock))


def stock_compiled(weights: Weights) -> Draw:
    """diffusers with its repeated blocks compiled."""
    transformer = stock_of(weights.ours).eval()
    transformer.compile_repeated_blocks()
    return _draw(_stock(weights, transformer))


def stock_cached(weights: Weights) -> Draw:
    """diffusers with cache-dit, every second step taken from its cache, whatever the error."""
    import cache_dit

    pipe = _stock(weights, stock_of(weights.ours).eval())
    forced = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=1e9,
        max_continuous_cached_steps=1,
    )
    cache_dit.enable_cache(pipe, cache_config=forced)
    return _draw(pipe)


def diffsynth(weights: Weights) -> Draw:
    """DiffSynth-Studio's pipeline, its model classes over the same weights."""
    package = _diffsynth_package()
    pipe = package.QwenImagePipeline(device=weights.device, torch_dtype=torch.bfloat16)
    with torch.device("meta"):
        pipe.dit = package.QwenImageDiT(num_layers=len(weights.ours.transformer_blocks))
    pipe.dit.pos_embed = type(pipe.dit.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    pipe.text_encoder = empty_module(package.QwenImageTextEncoder).to(torch.bfloat16)
    pipe.vae = package.QwenImageVAE().to(weights.device, torch.bfloat16)  # its statistics are no buffers
    for module, source in (
        (pipe.dit, weights.ours),
        (pipe.text_encoder, weights.text_encoder),
        (pipe.vae, weights.vae),
    ):
        module.load_state_dict(source.state_dict(), assign=True)
        module.eval().requires_grad_(False).to(weights.device)
    pipe.tokenizer = weights.tokenizer

    def draw(prompt: str, side: int, steps: int, on_step: OnStep) -> Any:
        def progress(timesteps: Any) -> Any:
            for timestep in timesteps:
                yield timestep
                on_step()

        return pipe(
            prompt,
            negative_prompt=NEGATIVE,
            cfg_scale=GUIDANCE,
            height=side,
            width=side,
            num_inference_steps=steps,
            seed=0,
            progress_bar_cmd=progress,
        )

    return draw


ARMS: dict[str, Callable[[Weights], Draw]] = {
    "ours": ours_optimized,
    "ours, as loaded": ours_as_loaded,
    "ours, fp8": lambda weights: ours_quantized(weights, "fp8"),
    "ours, int8": lambda weights: ours_quantized(weights, "int8"),
    "ours, every second step forecast": ours_every_second_step,
    "diffusers": stock_eager,
    "diffusers, compiled": stock_compiled,
    "diffusers, cache-dit, every second step": stock_cached,
    "diffsynth": diffsynth,
}


def _diffsynth_package() -> Any:
    """DiffSynth-Studio's module of this pipeline, without what the packages around it import besides (video,
    sound, libraries of pictures)."""
    if found := sys.modules.get("diffsynth.pipelines.qwen_image"):
        return found
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("it is not installed: pip install --no-deps diffsynth einops modelscope")
    (root,) = spec.submodule_search_locations
    for name in ("diffsynth", "diffsynth.core", "diffsynth.diffusion"):
        bare = ModuleType(name)
        bare.__path__ = [root + name.removeprefix("diffsynth").replace(".", "/")]
        sys.modules[name] = bare
    for part in ("device", "vram", "loader", "gradient", "attention"):
        names = vars(importlib.import_module(f"diffsynth.core.{part}"))
        vars(sys.modules["diffsynth.core"]).update({k: v for k, v in names.items() if not k.startswith("__")})
    scheduler = importlib.import_module("diffsynth.diffusion.flow_match").FlowMatchScheduler
    vars(sys.modules["diffsynth.diffusion"])["FlowMatchScheduler"] = scheduler
    return importlib.import_module("diffsynth.pipelines.qwen_image")


def _ours(weights: Weights, transformer: Any) -> Any:
    vae = empty_module(lambda: AutoencoderKLQwenImage.from_config(weights.vae.config))
    vae.load_state_dict(weights.vae.state_dict(), assign=True)
    return _assembled(QwenImagePipeline, weights, transformer, vae.eval().requires_grad_(False))


def _stock(weights: Weights, transformer: Any) -> Any:
    return _assembled(diffusers.QwenImagePipeline, weights, transformer, weights.vae)


def _assembled(package: Any, weights: Weights, transformer: Any, vae: Any) -> Any:
    pipe = package(
        scheduler=load_scheduler(),
        vae=vae,
        text_encoder=weights.text_encoder,
        tokenizer=weights.tokenizer,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(weights.device)  # ours starts compiling here


def _draw(pipe: Any) -> Draw:
    """Pictures of a pipeline that is called as diffusers' is."""

    def draw(prompt: str, side: int, steps: int, on_step: OnStep) -> Any:
        def stepped(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return {}

        return pipe(
            prompt,
            negative_prompt=NEGATIVE,
            true_cfg_scale=GUIDANCE,
            num_inference_steps=steps,
            height=side,
            width=side,
            generator=torch.Generator("cpu").manual_seed(0),
            callback_on_step_end=stepped,
            callback_on_step_end_tensor_inputs=[],
        ).images[0]

    return draw


def _random_text_encoder(layers: int, device: str) -> Any:
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "num_hidden_layers": layers}, vision_config=VISION_CONFIG
    )
    module = empty_module(lambda: Qwen2_5_VLForConditionalGeneration(config))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if "norm" in name and name.endswith("weight"):
            values.fill_(1)
        else:
            values.normal_(0, 0.02, generator=generator)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, torch.nn.Parameter(values, requires_grad=False))
    gc.collect()
    return module.to(device).eval()  # buffers
