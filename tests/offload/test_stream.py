"""A module that streams computes what it computes with all weights resident, bit for bit."""

import gc
import weakref

import diffusers
import pytest
import torch
from offload_cases import (
    BUDGETS,
    NUM_BLOCKS,
    LateLane,
    late_lane,
    limit_of,
    run,
    stock_transformer,
    text_encoder,
    text_inputs,
    transformer,
    transformer_inputs,
)

from diffusers_qwenimage import QwenImageTransformer2DModel, kernels
from diffusers_qwenimage.offload import fetched_bytes, memory, plan_stream, rest, stream, streamed, unstream
from diffusers_qwenimage.quantize import quantize_

MODELS = {
    "ours": (transformer, transformer_inputs),
    "diffusers": (stock_transformer, transformer_inputs),
    "text encoder": (text_encoder, lambda dtype: text_inputs()),
}


@pytest.mark.parametrize("split", [False, True, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_equal_at_every_budget(name, dtype, split):
    make, make_inputs = MODELS[name]
    model, inputs = make(dtype), make_inputs(dtype)
    expected = run(model, inputs)
    streamed_bytes = []
    for share in BUDGETS:
        limit = limit_of(model, share, split=split)
        plan = stream(model, device="cpu", vram_limit=limit, split=split)
        assert plan.device_bytes <= limit
        assert split is None or plan.is_split == (split and plan.num_slots > 0)
        assert (plan.streamed_bytes > 0) == (plan.num_slots > 0)
        streamed_bytes.append(plan.streamed_bytes)
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
    assert max(streamed_bytes) == streamed_bytes[0] and streamed_bytes[-1] == 0
    assert len(set(streamed_bytes)) > 2
    unstream(model)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("backend", ["off", "reference"])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_no_weight_is_read_before_it_came_or_after_it_went(backend, num_slots, split, monkeypatch):
    model, inputs = transformer(), transformer_inputs(lengths=(3, 9))
    with kernels.use_backend(backend), late_lane(monkeypatch, model):
        expected = run(model, inputs)
        for share in (0.0, 0.5):
            limit = limit_of(model, share) + 3 * plan_stream(model, limit_of(model, 0.0)).slot_bytes
            stream(model, device="cpu", vram_limit=limit, num_slots=num_slots, split=split)
            for _ in range(3):
                assert torch.equal(run(model, inputs), expected)


def test_the_late_lane_notices_a_missing_wait(monkeypatch):
    model, inputs = transformer(), transformer_inputs()
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
        monkeypatch.setattr(LateLane, "wait", lambda self, mark: None)
        assert run(model, inputs).isnan().any()


def test_weights_are_in_slots_within_blocks_and_at_home_outside():
    model, inputs = transformer(), transformer_inputs()
    homes = {}
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1)
    addresses = set()
    for block in model.transformer_blocks:
        homes[block] = block.img_mlp.net[2].weight.data_ptr()
        block.attn.register_forward_pre_hook(
            lambda module, args, block=block: addresses.add(block.img_mlp.net[2].weight.data_ptr())
        )
    run(model, inputs)
    assert len(addresses) == 1  # the one slot
    assert not addresses & set(homes.values())
    assert [block.img_mlp.net[2].weight.data_ptr() for block in homes] == list(homes.values())


def test_queries_keys_and_values_stay_one_product():
    model, inputs = transformer(torch.bfloat16), transformer_inputs(torch.bfloat16)
    with kernels.use_backend("reference"):
        expected = run(model, inputs)
        stream(model, device="cpu", vram_limit=limit_of(model, 0.3))
        assert torch.equal(run(model, inputs), expected)
        for block in model.transformer_blocks:
            attn = block.attn
            for trio in (
                (attn.to_q, attn.to_k, attn.to_v),
                (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            ):
                for name in ("weight", "bias"):
                    first, second, third = (getattr(layer, name) for layer in trio)
                    assert second.data_ptr() == first.data_ptr() + first.nbytes
                    assert third.data_ptr() == second.data_ptr() + second.nbytes


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8-storage"])
def test_quantised_weights_go_as_they_are(kind, split, monkeypatch):
    model, inputs = transformer(torch.bfloat16), transformer_inputs(torch.bfloat16)
    quantize_(model, kind)
    expected = run(model, inputs)
    with late_lane(monkeypatch, model):
        plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0, split=split), split=split)
        assert torch.equal(run(model, inputs), expected)
        named = dict(model.named_parameters())
        streams = [name for block in plan.blocks for name in block.streamed]
        weights = [named[name] for name in streams if name.endswith(".weight")]
        assert len(weights) == NUM_BLOCKS * 12
        assert {weight.dtype.itemsize for weight in weights} == {1}


def test_bytes_over_the_link():
    model, inputs = transformer(), transformer_inputs()
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.2))
    run(model, inputs)
    before = fetched_bytes(model)
    for _ in range(4):
        run(model, inputs)
    assert fetched_bytes(model) - before == 4 * plan.streamed_bytes


def test_modulation_is_tabulated_and_comes_on_call():
    model, inputs = transformer(), transformer_inputs(batch=1)
    sigmas = torch.tensor([0.9, 0.4])
    expected = [run(model, {**inputs, "timestep": sigma[None]}) for sigma in sigmas]
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.2))
    assert model.modulation_is_offloaded
    assert not any("_mod." in name for block in plan.blocks for name in (*block.resident, *block.streamed))
    table = model.tabulate_modulation(sigmas, dtype=torch.float32)
    for step, sigma in enumerate(sigmas):
        given = {**inputs, "timestep": sigma[None], "modulation": table.at(step)}
        assert torch.equal(run(model, given), expected[step])
        assert torch.equal(run(model, {**inputs, "timestep": sigma[None]}), expected[step])


def test_modulation_can_stream_like_the_rest():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    settings = {"on_call": ()}
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0, **settings), **settings)
    assert not model.modulation_is_offloaded and not plan.on_call
    assert torch.equal(run(model, inputs), expected)


def test_text_encoder_without_output_layer_and_vision_tower():
    model, inputs = text_encoder(), text_inputs()
    with torch.no_grad():
        expected = model.model.language_model(**inputs).last_hidden_state
        settings = {"blocks": ["model.language_model.layers"], "on_call": ["lm_head", "model.visual"]}
        plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0, **settings), **settings)
        assert torch.equal(model.model.language_model(**inputs).last_hidden_state, expected)
    assert plan.on_call[:2] == ("lm_head", "model.visual")
    assert len(plan.blocks) == len(model.model.language_model.layers)


def test_large_embeddings_are_gathered_on_the_host(monkeypatch):
    monkeypatch.setattr("diffusers_qwenimage.offload.survey.LARGE_BYTES", 10_000)
    model, inputs = text_encoder(), text_inputs()
    expected = run(model, inputs)
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    assert "model.language_model.embed_tokens" in plan.on_call and "lm_head" in plan.on_call
    assert torch.equal(run(model, inputs), expected)


def test_state_dict_and_saving(tmp_path):
    model, inputs = transformer(), transformer_inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model, inputs)
    stream(model, device="cpu", vram_limit=limit_of(model, 0.3))
    run(model, inputs)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert torch.equal(run(QwenImageTransformer2DModel.from_pretrained(tmp_path), inputs), expected)
    assert torch.equal(run(diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path), inputs), expected)


def test_another_budget_keeps_what_is_pinned():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    limit = limit_of(model, 0.0)
    first = stream(model, device="cpu", vram_limit=limit, num_slots=1)
    addresses = [parameter.data_ptr() for parameter in model.transformer_blocks.parameters()]
    second = stream(model, device="cpu", vram_limit=limit + 2 * first.slot_bytes, num_slots=3)
    assert second.streamed_bytes == first.streamed_bytes and second.num_slots == 3
    large = {name for block in second.blocks for name in block.streamed}
    now = [parameter.data_ptr() for parameter in model.transformer_blocks.parameters()]
    names = [f"transformer_blocks.{name}" for name, _ in model.transformer_blocks.named_parameters()]
    assert all(a == b for name, a, b in zip(names, addresses, now, strict=True) if name in large)
    assert torch.equal(run(model, inputs), expected)


def test_frozen_while_streaming():
    model = transformer().requires_grad_(True)
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.3))
    named = dict(model.named_parameters())
    assert plan.blocks[0].streamed
    assert not any(named[name].requires_grad for block in plan.blocks for name in block.streamed)
    unstream(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rest_gives_slots_back():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)
        rest(model)


def test_without_limit_nothing_streams():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    plan = stream(model, device="cpu")
    assert plan.num_slots == plan.streamed_bytes == plan.pinned_bytes == 0
    assert streamed(model) is plan
    assert torch.equal(run(model, inputs), expected)
    unstream(model)
    assert streamed(model) is None
    unstream(model)  # nothing to do


def test_meta_is_refused():
    with torch.device("meta"):
        model = transformer()
    with pytest.raises(ValueError, match="adopt"):
        stream(model, device="cpu", vram_limit=limit_of(transformer(), 0.5))
    assert streamed(model) is None


def test_old_slabs_go_at_once(monkeypatch):
    """Not when Python collects cycles: they are most of the machine's memory."""
    alive = weakref.WeakSet()
    make = memory.HostMemory.slab

    def slab(self, num_bytes):
        made = make(self, num_bytes)
        alive.add(made)
        return made

    monkeypatch.setattr(memory.HostMemory, "slab", slab)
    model, inputs = transformer(), transformer_inputs()
    gc.disable()
    try:
        for share in (0.0, 0.3, 0.6, 0.1):
            stream(model, device="cpu", vram_limit=limit_of(model, share))
            run(model, inputs)
            run(model, inputs)
            assert 0 < len(alive) <= 3 * NUM_BLOCKS  # three parts, where blocks are split
        unstream(model)
        assert not alive
    finally:
        gc.enable()


def test_a_part_of_a_block_after_the_other():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    limit = limit_of(model, 0.0, split=True)
    plan = stream(model, device="cpu", vram_limit=limit)  # by itself, where it is needed
    assert plan.is_split and plan.device_bytes == limit < limit_of(model, 0.0)
    parts = ("attn", "img_mlp", "txt_mlp")
    expected_names = [f"transformer_blocks.{i}.{part}" for i in range(NUM_BLOCKS) for part in parts]
    assert [block.name for block in plan.blocks] == expected_names
    block, there = model.transformer_blocks[2], []
    layers = {"attn": block.attn.to_q, "img_mlp": block.img_mlp.net[2], "txt_mlp": block.txt_mlp.net[2]}
    homes = {name: layer.weight.data_ptr() for name, layer in layers.items()}

    def look(*_):
        there.append([name for name, layer in layers.items() if layer.weight.data_ptr() != homes[name]])

    for layer in layers.values():
        layer.register_forward_pre_hook(look)
    assert torch.equal(run(model, inputs), expected)
    assert there == [["attn"], ["img_mlp"], ["txt_mlp"]]


def test_parts_of_blocks_are_for_inference():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    stream(model, device="cpu", vram_limit=limit_of(model, 0.3), split=True)
    with pytest.raises(ValueError, match=r"without gradients only.*torch.no_grad.*split=False"):
        model(**inputs)
    assert torch.equal(run(model, inputs), expected)


def test_from_blocks_to_parts_and_back():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    for split in (False, True, False):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.3), split=split)
        assert torch.equal(run(model, inputs), expected)
    unstream(model)
    assert not any("forward" in vars(part) for part in model.modules())
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("lengths", [None, (3, 9)])
@pytest.mark.parametrize("split", [None, True, False])
@pytest.mark.parametrize("kind", [None, "fp8", "int8", "fp8-storage"])
def test_saving_memory_computes_a_sample_and_a_part_at_a_time(kind, split, lengths):
    model, inputs = transformer(), transformer_inputs(lengths=lengths)
    if kind is not None:
        quantize_(model, kind)
    with kernels.use_backend("reference"):
        expected = run(model, inputs)
        model.save_memory()
        if split is not None:
            stream(model, device="cpu", vram_limit=limit_of(model, 0.0, split=split), split=split)
        for _ in range(2):
            got = run(model, inputs)
            # Products of fewer rows may be summed in another order.
            assert (got - expected).norm() <= 1e-5 * expected.norm()
        model.save_memory(False)
        unstream(model)
        assert torch.equal(run(model, inputs), expected)


def test_saving_memory_leaves_what_hooks_see():
    """A step cache keeps the streams of a block; they are not written over then."""
    model, inputs = transformer(), transformer_inputs()
    seen = []
    with kernels.use_backend("reference"):
        model.save_memory()
        assert all(block.may_overwrite for block in model.transformer_blocks)
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0, split=False), split=False)
        assert all(block.may_overwrite for block in model.transformer_blocks)
        block = model.transformer_blocks[1]
        block.register_forward_hook(
            lambda module, args, output: seen.append((args[0], args[0].clone(), output[1], output[1].clone()))
        )
        assert not block.may_overwrite
        run(model, inputs)
    [(image, before, result, after)] = seen
    assert torch.equal(image, before) and not torch.equal(result, image)
    assert not torch.equal(result, after)  # the next block's, which nobody watches


def test_the_device_is_the_gpu_or_else_the_cpu():
    model = transformer()
    plan = stream(model, vram_limit=limit_of(model, 0.0))
    assert torch.device(plan.device).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("source", ["pinned", "mapped"])
def test_layers_that_are_replaced_go_at_once(source):
    """Nothing that streaming has left keeps old weights, on the device too, until Python collects cycles."""
    model = transformer()
    weights = [weakref.ref(block.attn.to_q.weight) for block in model.transformer_blocks]
    gc.collect()
    gc.disable()
    try:
        stream(model, device="cpu", vram_limit=limit_of(model, 0.4), source=source)
        run(model, transformer_inputs())
        unstream(model)
        quantize_(model, "fp8")
        assert [weight() for weight in weights] == [None] * NUM_BLOCKS
    finally:
        gc.enable()
