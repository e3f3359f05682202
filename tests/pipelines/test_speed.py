"""optimize, presets and step caches of the pipelines."""

import math

import diffusers
import pytest
import torch
from components import pipelines, random
from lora_made import write_lora

from diffusers_qwenimage.graphs import graphs_of
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.pipelines import QwenImageImg2ImgPipeline, QwenImagePipeline
from diffusers_qwenimage.pipelines.presets import PRESETS
from diffusers_qwenimage.pipelines.speed import GIB, _by_memory
from diffusers_qwenimage.step_cache import ForecastCache


@pytest.fixture
def pipe():
    return pipelines("QwenImagePipeline")[0]


def picture(pipe, **changes):
    arguments = {
        "prompt_embeds": random(1, 7, 16),
        "prompt_embeds_mask": torch.ones(1, 7),
        "num_inference_steps": 6,
        "height": 64,
        "width": 64,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
    arguments.update(changes)
    return pipe(**{key: value for key, value in arguments.items() if value is not None}).images


NEGATIVE = {
    "negative_prompt_embeds": random(1, 4, 16, seed=3),
    "negative_prompt_embeds_mask": torch.ones(1, 4),
    "true_cfg_scale": 3.0,
}


def calls_of(pipe):
    calls = []
    pipe.transformer.img_in.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    return calls


# Presets.


@pytest.fixture
def lora(tmp_path):
    return write_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(("name", "steps"), [("lightning-8", 8), ("lightning-4", 4)])
def test_preset_sets_steps_guidance_schedule_and_adapter(pipe, lora, name, steps):
    before = pipe.scheduler
    calls = calls_of(pipe)
    pipe.use_preset(name, source=lora)
    picture(pipe, num_inference_steps=None, **{**NEGATIVE, "true_cfg_scale": None})
    assert calls == [1] * steps
    assert pipe.transformer.active_adapters() == ["preset"]
    assert pipe.scheduler is not before
    # shift 3: sigma' = 3 sigma / (1 + 2 sigma), the same at every resolution
    sigmas = torch.linspace(1, 1 / steps, steps)
    assert torch.allclose(pipe.scheduler.sigmas[:-1], 3 * sigmas / (1 + 2 * sigmas), atol=1e-6)
    assert math.isclose(pipe.scheduler.config.base_shift, math.log(3))


def test_arguments_of_a_call_win(pipe, lora):
    pipe.use_preset("lightning-8", source=lora)
    calls = calls_of(pipe)
    picture(pipe, num_inference_steps=3)
    picture(pipe, num_inference_steps=2, **NEGATIVE)
    assert calls == [1, 1, 1, 2, 2]


def test_preset_none_is_the_pipeline_as_it_was(pipe, lora):
    expected, scheduler = picture(pipe), pipe.scheduler
    pipe.use_preset("lightning-4", source=lora)
    assert not torch.equal(picture(pipe, num_inference_steps=6), expected)
    pipe.use_preset("lightning-8", source=lora)
    pipe.use_preset(None)
    assert pipe.scheduler is scheduler
    assert torch.equal(picture(pipe), expected)
    assert not getattr(pipe.transformer, "peft_config", None)


def test_preset_works_beside_other_adapters(pipe, lora, tmp_path):
    other = write_lora(tmp_path / "other.safetensors", seed=5)
    pipe.load_lora_weights(other, adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    expected = picture(pipe)
    pipe.use_preset("lightning-8", source=lora)
    assert sorted(pipe.transformer.active_adapters()) == ["preset", "style"]
    layer = next(m for m in pipe.transformer.modules() if "style" in getattr(m, "scaling", {}))
    assert layer.scaling["style"] == 0.5 * layer.lora_alpha["style"] / layer.r["style"]
    pipe.use_preset(None)
    assert torch.equal(picture(pipe), expected)


def test_preset_goes_with_from_pipe(pipe, lora):
    pipe.use_preset("lightning-4", source=lora)
    other = QwenImageImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    calls = calls_of(other)
    picture(other, num_inference_steps=None, image=random(1, 3, 64, 64).clamp(-1, 1), strength=1.0)
    assert calls == [1] * 4


def test_unknown_preset_and_foreign_lora_are_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="lightning-4, lightning-8"):
        pipe.use_preset("lightning-2")
    scheduler = pipe.scheduler
    with pytest.raises(ValueError):
        pipe.use_preset("lightning-4", source={"nothing.lora_A.weight": torch.zeros(2, 2)})
    assert pipe.scheduler is scheduler and pipe._preset is None


def test_published_names():
    assert {preset.num_inference_steps for preset in PRESETS.values()} == {4, 8}
    for preset in PRESETS.values():
        assert f"{preset.num_inference_steps}steps" in preset.weight_name


# Guidance interval and step cache.


def test_guidance_interval_of_a_call(pipe):
    calls = calls_of(pipe)
    picture(pipe, **NEGATIVE, cfg_end=0.5)
    assert calls == [2, 2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="cfg_start <= cfg_end"):
        picture(pipe, cfg_start=0.6, cfg_end=0.5)


def test_step_cache_of_a_pipeline(pipe):
    expected = picture(pipe, **NEGATIVE)
    pipe.enable_step_cache(ForecastCache(every=2, first_steps=2))
    calls = calls_of(pipe)
    cached = picture(pipe, **NEGATIVE)
    assert calls == [2] * 5
    assert not torch.equal(cached, expected)
    pipe.disable_step_cache()
    assert torch.equal(picture(pipe, **NEGATIVE), expected)


# optimize.


def test_optimize_on_a_cpu_says_what_it_cannot_do_and_changes_nothing(pipe):
    expected = picture(pipe)
    chosen = pipe.optimize()
    assert torch.equal(picture(pipe), expected)
    assert chosen["kernels"].chosen == "plain torch" and "not an NVIDIA GPU" in chosen["kernels"].reason
    assert chosen["CUDA graphs"].chosen == "off"
    assert chosen["modulation"].chosen == "resident"
    assert chosen["autoencoder"].chosen == "2-D convolutions"
    assert chosen["weights"].chosen == "float32"
    assert chosen["step cache"].chosen == "off"
    text = str(chosen)
    assert text == repr(chosen) and len(text.splitlines()) == 7
    for line in text.splitlines():
        assert len(line.split("  ")) >= 3


def test_optimize_with_the_fused_path(pipe):
    expected = picture(pipe)
    with use_backend("reference"):
        chosen = pipe.optimize(graphs="on", step_cache=ForecastCache(every=2))
        assert chosen["kernels"].chosen == "fused path"
        assert "4 groups" in chosen["kernels"].reason  # two blocks, two streams
        assert chosen["autoencoder"].chosen == "fused path"
        pipe.disable_step_cache()
        # fused sums are added in another order
        assert (picture(pipe) - expected).abs().max() < 1e-4
    assert graphs_of(pipe.transformer).mode == "on"


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8-storage"])
def test_optimize_quantises(pipe, kind):
    expected = picture(pipe)
    chosen = pipe.optimize(weights=kind)
    assert chosen["weights"].chosen == kind and "24 layers in 8 bits" in chosen["weights"].reason
    got = picture(pipe)
    assert not torch.equal(got, expected)
    assert (got - expected).abs().mean() < 0.1
    assert pipe.optimize()["weights"].chosen == "8 bits"


def test_optimize_quantises_the_text_encoder(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder)
    before, _ = pipe.encode_prompt("a red circle")
    chosen = pipe.optimize(text_encoder="fp8-storage")
    assert chosen["text encoder"].chosen == "fp8-storage"
    after, _ = pipe.encode_prompt("a red circle")
    assert after.dtype == before.dtype and not torch.equal(after, before)
    # e4m3 keeps 4 bits of a weight
    assert (after - before).norm() < 0.1 * before.norm()
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="no text encoder"):
        pipe.optimize(text_encoder="fp8")


def test_optimize_takes_what_it_is_told(pipe):
    chosen = pipe.optimize(attention="_native_math", graphs="off", modulation="tabulated")
    assert chosen["attention"].chosen == "_native_math"
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend == "_native_math"
    assert chosen["CUDA graphs"].reason == "asked for"
    assert chosen["modulation"].reason == "the model is in host memory already"
    for wrong in ({"weights": "int4"}, {"graphs": "yes"}, {"modulation": "gone"}, {"attention": "quick"}):
        with pytest.raises(ValueError):
            pipe.optimize(**wrong)


def test_modulation_by_memory(pipe):
    assert _by_memory(pipe.transformer, 20 * GIB, 80 * GIB)[0] == "resident"
    chosen, reason = _by_memory(pipe.transformer, 4 * GIB, 24 * GIB)
    assert chosen == "tabulated" and "only" in reason


def test_optimize_of_diffusers_components():
    _, stock = pipelines("QwenImagePipeline")
    ours, _ = pipelines("QwenImagePipeline")
    ours.register_modules(transformer=stock.transformer, vae=stock.vae)
    chosen = ours.optimize()
    assert "not the package's own" in chosen["transformer"].reason
    assert isinstance(ours.transformer, diffusers.QwenImageTransformer2DModel)
    assert chosen["autoencoder"].chosen == "as it is"
    ours.release_graphs()
