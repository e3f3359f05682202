"""Streaming beside other hooks, adapters and what moves modules."""

import copy

import accelerate
import components
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from offload_cases import late_lane, limit_of, run, transformer, transformer_inputs
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.offload import fetched_bytes, stream, streamed, unstream

MODULES = ["to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.2", "txt_mlp.net.0.proj", "img_mod.1", "proj_out"]


def lora_of(model, seed=1):
    """The state dict of a LoRA for the model."""
    other = transformer()
    other.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=MODULES))
    state = get_peft_model_state_dict(other)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in state.items()}


def load(model, lora, name="style"):
    model.load_lora_adapter({f"transformer.{key}": value for key, value in lora.items()}, adapter_name=name)


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_in_any_order(lora_first, share, monkeypatch):
    model, inputs = transformer(), transformer_inputs()
    lora, plain = lora_of(model), run(model, inputs)
    load(model, lora)
    adapted = run(model, inputs)
    model.fuse_lora()
    fused = run(model, inputs)
    model.unfuse_lora()
    model.delete_adapters(["style"])
    model.unload_lora()
    model = transformer()
    with late_lane(monkeypatch, model):
        if lora_first:
            load(model, lora)
        stream(model, device="cpu", vram_limit=limit_of(model, share))
        if not lora_first:
            assert torch.equal(run(model, inputs), plain)
            load(model, lora)
        for _ in range(2):
            assert torch.equal(run(model, inputs), adapted)
        model.disable_lora()
        assert torch.equal(run(model, inputs), plain)
        model.enable_lora()
        model.fuse_lora()
        for _ in range(2):
            assert torch.equal(run(model, inputs), fused)
        model.unfuse_lora()
        assert torch.allclose(
            run(model, inputs), adapted, atol=1e-4
        )  # as without streaming: sums are rounded
        model.unload_lora()
        assert torch.allclose(run(model, inputs), plain, atol=1e-4)
    unstream(model)
    assert torch.allclose(run(model, inputs), plain, atol=1e-4)


def test_fused_before_the_first_forward(monkeypatch):
    model, inputs = transformer(), transformer_inputs()
    lora = lora_of(model)
    other = transformer()
    load(other, lora)
    other.fuse_lora()
    expected = run(other, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
        run(model, inputs)  # blocks of the next pass are fetched ahead now
        load(model, lora)
        model.fuse_lora()
        assert torch.equal(run(model, inputs), expected)


def test_disabling_a_fused_lora_unfuses_at_home(monkeypatch):
    model, inputs = transformer(), transformer_inputs()
    plain = run(model, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
        load(model, lora_of(model))
        run(model, inputs)
        model.fuse_lora()
        model.disable_lora()  # PEFT unfuses within the forward
        for _ in range(3):
            assert torch.allclose(run(model, inputs), plain, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_are_used(in_place, monkeypatch):
    model, inputs, other = transformer(), transformer_inputs(), transformer(seed=3)
    expected = run(other, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.2))
        run(model, inputs)
        model.load_state_dict(other.state_dict(), assign=not in_place)
        for _ in range(2):
            assert torch.equal(run(model, inputs), expected)


def test_data_changed_behind_the_back_of_versions(monkeypatch):
    model, inputs, other = transformer(), transformer_inputs(), transformer(seed=3)
    expected = run(other, inputs)
    with late_lane(monkeypatch, model), torch.no_grad():
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
        run(model, inputs)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs)
        assert torch.equal(run(model, inputs), expected)


def test_a_weight_of_another_shape_is_refused():
    model, inputs = transformer(), transformer_inputs()
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    layer = model.transformer_blocks[2].img_mlp.net[2]
    before = layer.weight.data
    layer.weight.data = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="transformer_blocks.2.img_mlp.net.2.weight.*unstream"):
        run(model, inputs)
    layer.weight.data = before
    run(model, inputs)


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_first_block_cache(cache_first, threshold, monkeypatch):
    def steps(model):
        results = []
        for scale in (1.0, 1.001, 1.5):
            with model.cache_context("cond"):
                given = {**inputs, "hidden_states": inputs["hidden_states"] * scale}
                results.append(run(model, given))
        return results

    config = FirstBlockCacheConfig(threshold=threshold)
    inputs, reference = transformer_inputs(), transformer()
    reference.enable_cache(config)
    expected = steps(reference)
    model = transformer()
    with late_lane(monkeypatch, model):
        if cache_first:
            model.enable_cache(config)
        plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1)
        if not cache_first:
            model.enable_cache(config)
        assert all(torch.equal(*pair) for pair in zip(steps(model), expected, strict=True))
        if threshold:  # skipped blocks are not fetched
            assert fetched_bytes(model) < 2 * plan.streamed_bytes
        unstream(model)
        model._reset_stateful_cache()
        assert all(torch.equal(*pair) for pair in zip(steps(model), expected, strict=True))
        model.disable_cache()
        run(model, inputs)


def test_other_hooks_stay_in_order():
    calls = []

    class Hook(ModelHook):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            calls.append((self.name, module.img_mlp.net[2].weight.data_ptr()))
            return args, kwargs

    model, inputs = transformer(), transformer_inputs()
    block = model.transformer_blocks[1]
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(Hook("inner"), "inner")
    registry.register_hook(Hook("outer"), "outer")
    expected = run(model, inputs)
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    home = block.img_mlp.net[2].weight.data_ptr()
    calls.clear()
    assert torch.equal(run(model, inputs), expected)
    assert calls == [("outer", home), ("inner", home)]  # before the weights come
    registry.remove_hook("outer")
    assert torch.equal(run(model, inputs), expected)
    unstream(model)
    calls.clear()
    run(model, inputs)
    assert [name for name, _ in calls] == ["inner"]
    assert registry._hook_order == ["inner"]


def test_moving_is_answered():
    model, inputs = transformer(), transformer_inputs()
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    with pytest.raises(ValueError, match=r"cannot be moved to meta.*unstream"):
        model.to("meta")
    with pytest.raises(ValueError, match=r"cannot be cast to torch.bfloat16.*unstream"):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be cast"):
        model.half()
    torch.nn.ModuleList([model]).cpu()
    run(model, inputs)
    unstream(model)
    model.to(torch.bfloat16)


def test_copies_are_refused():
    model = transformer()
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    with pytest.raises(ValueError, match="cannot be copied"):
        copy.deepcopy(model)
    unstream(model)
    copy.deepcopy(model)


def test_hooks_of_accelerate_are_refused():
    model = transformer()
    accelerate.hooks.add_hook_to_module(model.transformer_blocks[0], accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="remove_all_hooks"):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    assert streamed(model) is None
    accelerate.hooks.remove_hook_from_submodules(model)
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))


def test_in_a_pipeline():
    pipeline, _ = components.pipelines("QwenImagePipeline")
    assert isinstance(pipeline, QwenImagePipeline)
    arguments = {
        "prompt_embeds": components.random(1, 5, components.WIDTH),
        "negative_prompt_embeds": components.random(1, 3, components.WIDTH, seed=1),
        "height": 64,
        "width": 96,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    # All blocks resident, and the modulation tabulated as when they are not: on a CPU the product of one row
    # can differ from that of two in the last bit.
    plan = stream(pipeline.transformer, device="cpu", on_call=("img_mod", "txt_mod"))
    assert plan.num_slots == 0
    expected = pipeline(**arguments, generator=components.generator()).images
    stream(pipeline.transformer, device="cpu", vram_limit=limit_of(pipeline.transformer, 0.1))
    assert torch.equal(pipeline(**arguments, generator=components.generator()).images, expected)
    pipeline.to("cpu")
    assert torch.equal(pipeline(**arguments, generator=components.generator()).images, expected)
