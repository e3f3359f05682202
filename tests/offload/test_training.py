"""Training adapters over a frozen base that streams."""

import pytest
import torch
from offload_cases import late_lane, limit_of, run, stock_transformer, transformer, transformer_inputs
from peft import LoraConfig

from diffusers_qwenimage.offload import fetched_bytes, stream, unstream
from diffusers_qwenimage.quantize import quantize_

MODULES = ["to_q", "to_v", "add_k_proj", "to_out.0", "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1"]


def with_lora(model):
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=MODULES))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.train()
    return model


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found and all("lora_" in name for name in found)
    return found


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", [None, "fp8", "fp8-storage"])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_gradients_with_checkpointing(num_slots, kind, monkeypatch):
    model, inputs = transformer(), transformer_inputs(lengths=(4, 6))
    if kind is not None:
        quantize_(model, kind)
    with_lora(model).enable_gradient_checkpointing()
    expected = gradients(model, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0) * 3, num_slots=num_slots, split=False)
        for _ in range(3):
            assert_equal(gradients(model, inputs), expected)
        with torch.no_grad():  # a validation between two steps
            model(**inputs)
        assert_equal(gradients(model, inputs), expected)
        unstream(model)
    assert_equal(gradients(model, inputs), expected)


def test_gradients_of_diffusers_model(monkeypatch):
    model, inputs = with_lora(stock_transformer()), transformer_inputs()
    model.enable_gradient_checkpointing()
    expected = gradients(model, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.2), split=False)
        assert_equal(gradients(model, inputs), expected)


def test_reentrant_checkpoints(monkeypatch):
    model, inputs = with_lora(transformer()), transformer_inputs()
    inputs["hidden_states"].requires_grad_(True)  # what reentrant checkpoints need

    def checkpoint(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    model.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    expected = gradients(model, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1, split=False)
        assert_equal(gradients(model, inputs), expected)


def test_a_backward_pass_fetches_what_is_not_there_only():
    model, inputs = with_lora(transformer()), transformer_inputs()
    model.enable_gradient_checkpointing()
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0) * 2, num_slots=2, split=False)
    gradients(model, inputs)
    before = fetched_bytes(model)
    for _ in range(3):
        gradients(model, inputs)
    # Forwards and backwards; what the turns need twice is there, some guesses ahead are wrong.
    assert fetched_bytes(model) - before <= 3 * 2 * plan.streamed_bytes


def test_without_checkpoints_autograd_notices():
    model, inputs = with_lora(transformer()), transformer_inputs()
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1, split=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, inputs)
    model.enable_gradient_checkpointing()
    gradients(model, inputs)


def test_the_base_is_never_trained():
    model, inputs = transformer().requires_grad_(True), transformer_inputs()
    model.enable_gradient_checkpointing()
    model.train()
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0), split=False)
    model(**inputs).sample.mean().backward()
    named = dict(model.named_parameters())
    assert all(named[name].grad is None for block in plan.blocks for name in block.streamed)


def test_asking_for_gradients_of_the_base_is_refused():
    model, inputs = transformer(), transformer_inputs()
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0), split=False)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"transformer_blocks.0 ask for gradients.*requires_grad_\(False\)"):
        model(**inputs)
    run(model, inputs)
    model.requires_grad_(False)
    model(**inputs)


def test_weights_are_at_home_after_a_backward_pass_is_settled():
    model, inputs = with_lora(transformer()), transformer_inputs()
    model.enable_gradient_checkpointing()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1, split=False)
    gradients(model, inputs)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    unstream(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
