"""Weights that are copied packed: what is computed is equal bit for bit, in fewer copied bytes."""

import pytest
import torch
from offload_cases import late_lane, limit_of, run, transformer, transformer_inputs
from peft import LoraConfig

from diffusers_qwenimage.offload import fetched_bytes, pack_streamed, stream, streamed, unstream

BF16 = torch.bfloat16


def packed_model(num_slots=3, dtype=BF16):
    model = transformer(dtype, num_layers=8)
    limit = limit_of(model, 0.0) * (num_slots + 2) // 2
    stream(model, device="cpu", vram_limit=limit, num_slots=num_slots, split=False)
    return model


def with_lora(model):
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "add_k_proj", "img_mlp.net.2"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.enable_gradient_checkpointing()
    return model.train()


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).sample.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_slots", [2, 3])
def test_forwards_are_equal(num_slots, monkeypatch):
    model, inputs = transformer(BF16), transformer_inputs(BF16)
    expected = run(model, inputs)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with late_lane(monkeypatch, model):
        limit = limit_of(model, 0.0) * 3
        plan = stream(model, device="cpu", vram_limit=limit, num_slots=num_slots, split=False)
        assert plan.streamed_bytes
        pack_streamed(model)
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        unstream(model)
    assert torch.equal(run(model, inputs), expected)


def test_gradients_are_equal(monkeypatch):
    model, inputs = with_lora(transformer(BF16)), transformer_inputs(BF16, lengths=(4, 6))
    expected = gradients(model, inputs)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0) * 3, num_slots=3, split=False)
        pack_streamed(model)
        for _ in range(3):
            found = gradients(model, inputs)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        with torch.no_grad():  # a validation between two steps
            model(**inputs)
        assert all(torch.equal(value, expected[name]) for name, value in gradients(model, inputs).items())


def test_fewer_bytes_are_copied():
    model, inputs = packed_model(), transformer_inputs(BF16)
    plan = streamed(model)
    run(model, inputs)
    before = fetched_bytes(model)
    run(model, inputs)
    unpacked = fetched_bytes(model) - before
    packed = pack_streamed(model)
    assert packed < 0.85 * plan.streamed_bytes  # of small weights a little more than 0.75 remains
    before = fetched_bytes(model)
    for _ in range(2):
        run(model, inputs)
    assert 0 < fetched_bytes(model) - before < 2 * unpacked


def test_the_turn_of_a_backward_pass_copies_nothing_again():
    model, inputs = with_lora(packed_model()), transformer_inputs(BF16)
    packed = pack_streamed(model)
    gradients(model, inputs)
    before = fetched_bytes(model)
    gradients(model, inputs)
    # Twice through all blocks, of which the last ones are there at the turn.
    assert fetched_bytes(model) - before <= 2 * packed


@pytest.mark.parametrize("place", ["home", "replaced", "behind our back"])
def test_changed_weights_are_used(place):
    model, inputs = packed_model(), transformer_inputs(BF16)
    pack_streamed(model)
    run(model, inputs)
    name = next(name for name in streamed(model).blocks[1].streamed if name.endswith("weight"))
    parameter = dict(model.named_parameters())[name]
    if place == "replaced":
        parameter.data = parameter.data * 2
    else:
        with torch.no_grad():
            parameter.mul_(2)
    found = run(model, inputs)
    assert torch.equal(run(model, inputs), found)
    unstream(model)
    assert torch.equal(run(model, inputs), found)


def test_fused_lora_is_used():
    model, inputs = with_lora(packed_model()).eval(), transformer_inputs(BF16)
    pack_streamed(model)
    run(model, inputs)
    model.fuse_lora()
    found = run(model, inputs)
    unstream(model)
    assert torch.equal(run(model, inputs), found)


def test_other_types_are_copied_as_they_are():
    model, inputs = packed_model(dtype=torch.float32), transformer_inputs()
    expected = run(model, inputs)
    plan = streamed(model)
    assert pack_streamed(model) == plan.streamed_bytes
    assert torch.equal(run(model, inputs), expected)


def test_streaming_again_copies_as_it_is():
    model, inputs = packed_model(), transformer_inputs(BF16)
    expected = run(model, inputs)
    pack_streamed(model)
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0) * 2, num_slots=2, split=False)
    assert torch.equal(run(model, inputs), expected)
    before = fetched_bytes(model)
    for _ in range(4):
        run(model, inputs)
    assert fetched_bytes(model) - before > 3 * plan.streamed_bytes * 0.8


def test_what_cannot_be_packed_is_refused():
    model = packed_model(num_slots=1)
    with pytest.raises(ValueError, match="pinned memory and two slots"):
        pack_streamed(model)
    assert pack_streamed(transformer(BF16)) == 0
