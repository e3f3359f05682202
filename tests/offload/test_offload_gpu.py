"""Streaming to a GPU: exact at every budget, within the budget, with copies beside the work."""

import pytest
import torch
from peft import LoraConfig

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module, read_component
from diffusers_qwenimage.offload import (
    adopt,
    fetched_bytes,
    pack_streamed,
    plan_stream,
    rest,
    stream,
    streamed,
    unstream,
)
from diffusers_qwenimage.offload.memory import HostMemory
from diffusers_qwenimage.offload.recording import recording, replaying
from diffusers_qwenimage.quantize import quantize_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BLOCKS = 6


def build(dtype=torch.bfloat16):
    """A few blocks of a third of the true width, in host memory."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = QwenImageTransformer2DModel(num_layers=BLOCKS, num_attention_heads=8).to(dtype)
    return model.to("cpu").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(autouse=True)
def back_home(request):
    yield
    if "model" in request.fixturenames:
        unstream(request.getfixturevalue("model"))


def inputs_of(dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    return {
        "hidden_states": normal(2, 31 * 33, 64),
        "encoder_hidden_states": [normal(77, 3584), normal(10, 3584)],
        "timestep": torch.full((2,), 0.7, device=DEVICE, dtype=dtype),
        "img_shapes": [[(1, 31, 33)]] * 2,
    }


@torch.no_grad()
def run(model, inputs, table=None):
    return model(**inputs, modulation=table).sample


@torch.no_grad()
def tabulated(model):
    sigmas = torch.tensor([0.7], device=DEVICE, dtype=torch.bfloat16)
    return model.tabulate_modulation(sigmas, dtype=torch.bfloat16).at(0)


def test_pinned_without_rounding():
    memory = HostMemory(DEVICE)
    slab = memory.pin(memory.slab(300 * 10**6))
    assert memory.how == "registered"
    assert slab.tensor.is_pinned()
    slab.unpin()
    assert not slab.tensor.is_pinned()


def test_exact_and_within_the_budget(model):
    inputs = inputs_of()
    stream(model, device="cuda", on_call=("img_mod", "txt_mod"))  # all blocks resident
    table = tabulated(model)
    expected = run(model, inputs, table)
    beside = torch.cuda.memory_allocated() - streamed(model).device_bytes
    whole = plan_stream(model, None)
    for share, num_slots in ((0.0, 1), (0.35, 2), (0.5, 3)):
        limit = int(whole.smallest_bytes + share * (whole.resident_bytes - whole.smallest_bytes))
        plan = stream(model, device="cuda", vram_limit=limit, num_slots=num_slots)
        assert plan.streamed_bytes > 0
        assert torch.cuda.memory_allocated() - beside <= limit + 32 * 2**20
        results = [run(model, inputs, table) for _ in range(8)]
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("num_slots", [2, 3])
def test_packed(model, num_slots):
    """Equal in three quarters of the bytes, launched and recorded."""
    inputs = inputs_of()
    stream(model, device="cuda", on_call=("img_mod", "txt_mod"))
    table = tabulated(model)
    expected = run(model, inputs, table)
    whole = plan_stream(model, None)
    limit = int(whole.smallest_bytes + 0.5 * (whole.resident_bytes - whole.smallest_bytes))
    plan = stream(model, device="cuda", vram_limit=limit, num_slots=num_slots)
    copied = pack_streamed(model)
    assert 0.7 < copied / plan.streamed_bytes < 0.8
    assert all(torch.equal(run(model, inputs, table), expected) for _ in range(8))
    before = fetched_bytes(model)
    run(model, inputs, table)
    assert fetched_bytes(model) - before <= copied
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), recording(model):
        result = run(model, inputs, table)
    for _ in range(3):
        result.zero_()
        with replaying(model):
            graph.replay()
        assert torch.equal(result, expected)
        assert torch.equal(run(model, inputs, table), expected)  # in between


def test_parts_of_blocks_and_saving_memory(model):
    """Slots for parts of blocks: equal to resident weights, with less memory beside them."""
    inputs = inputs_of()
    stream(model, device="cuda", on_call=("img_mod", "txt_mod"))
    table = tabulated(model)
    expected = run(model, inputs, table)
    smallest = plan_stream(model, None, split=True)
    for frugal in (False, True):
        model.save_memory(frugal)
        for limit in (smallest.smallest_bytes, smallest.smallest_overlapping_bytes):
            plan = stream(model, device="cuda", vram_limit=limit)
            assert plan.is_split and plan.device_bytes <= limit
            run(model, inputs, table)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results = [run(model, inputs, table) for _ in range(6)]
            assert all(torch.equal(result, expected) for result in results)
            if frugal:  # both streams, four widths of one sample, and the results themselves
                one = (31 * 33 + 77) * model.inner_dim * 2
                assert torch.cuda.max_memory_allocated() - before <= 7 * one + 16 * 2**20
    model.save_memory(False)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_parts_of_quantised_blocks(kind):
    inputs, model = inputs_of(), build().to(DEVICE)
    quantize_(model, kind)
    model.save_memory()
    expected = run(model, inputs)
    plan = stream(
        model, device="cuda", vram_limit=plan_stream(model, None, split=True).smallest_overlapping_bytes
    )
    assert plan.is_split
    assert all(torch.equal(run(model, inputs), expected) for _ in range(4))


def test_a_slow_block_before_and_after(model):
    """Work that is still running when the host has given everything: slots must not be overwritten."""
    inputs = inputs_of()
    stream(model, device="cuda", on_call=("img_mod", "txt_mod"))
    table = tabulated(model)
    expected = run(model, inputs, table)
    stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)
    wait = 20_000_000  # clock cycles: some 10 ms, longer than a copy
    for slow in range(BLOCKS):
        hook = model.transformer_blocks[slow].attn.norm_q.register_forward_pre_hook(
            lambda *_: torch.cuda._sleep(wait)
        )
        torch.cuda._sleep(wait)
        results = [run(model, inputs, table) for _ in range(3)]
        hook.remove()
        plain = run(model, inputs, table)
        assert all(torch.equal(result, results[0]) for result in results)
        assert torch.equal(plain, expected)


def test_slots_come_and_go(model):
    inputs = inputs_of()
    stream(model, device="cuda", on_call=("img_mod", "txt_mod"))
    table = tabulated(model)
    expected = run(model, inputs, table)
    plan = stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)
    for _ in range(3):
        results = [run(model, inputs, table) for _ in range(2)]
        with_slots = torch.cuda.memory_allocated()
        rest(model)
        assert with_slots - torch.cuda.memory_allocated() >= plan.slot_bytes * 0.99
        assert all(torch.equal(result, expected) for result in results)


def test_modulation_on_call(model):
    inputs = inputs_of()
    model.to(DEVICE)
    expected = run(model, inputs)
    stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)
    assert model.modulation_is_offloaded
    assert torch.equal(run(model, inputs), expected)
    assert torch.equal(run(model, inputs, tabulated(model)), expected)


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8-storage"])
def test_quantised(kind):
    inputs, model = inputs_of(), build().to(DEVICE)
    quantize_(model, kind)
    expected = run(model, inputs)
    stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)
    assert all(torch.equal(run(model, inputs), expected) for _ in range(4))


def test_lora_loaded_and_fused_while_streaming():
    inputs, model = inputs_of(), build()
    stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "img_mlp.net.2", "img_mod.1"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    model.requires_grad_(False)
    adapted = run(model, inputs)
    assert not torch.equal(adapted, plain)
    assert torch.equal(run(model, inputs), adapted)
    model.fuse_lora()
    fused = run(model, inputs)
    assert torch.equal(run(model, inputs), fused)
    # bf16 weights are rounded when a LoRA is added to them.
    assert (fused - adapted).norm() < 0.05 * adapted.norm()
    unstream(model, device=DEVICE)
    assert torch.equal(run(model, inputs), fused)


def test_training_with_checkpoints():
    inputs, model = inputs_of(), build()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "img_mlp.net.2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    model.train()
    model.enable_gradient_checkpointing()

    def gradients():
        model.zero_grad()
        model(**inputs).sample.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.to(DEVICE)
    expected = gradients()
    model.to("cpu")
    limit = plan_stream(model, None, split=False).smallest_overlapping_bytes
    stream(model, device="cuda", vram_limit=limit, split=False)
    for step in range(6):
        if step == 3:
            pack_streamed(model)
        got = gradients()
        assert len(got) == len(expected) > 0
        # Sums over tokens in the backward of attention are added in any order.
        assert all((a - b).norm() <= 1e-2 * b.norm() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("source", ["pinned", "mapped"])
def test_adopted_from_a_file(source, model, tmp_path):
    inputs = inputs_of()
    model.save_pretrained(tmp_path)
    model.to(DEVICE)
    expected = run(model, inputs)
    model.to("cpu")
    config, weights = read_component(tmp_path, "transformer")
    adopted = empty_module(lambda: QwenImageTransformer2DModel.from_config(config)).to(torch.bfloat16).eval()
    limit = plan_stream(model, None).smallest_overlapping_bytes + 3 * 10**7
    plan = adopt(adopted, weights, device="cuda", vram_limit=limit, source=source)
    assert plan.streamed_bytes and plan.source == source
    for _ in range(3):
        assert torch.equal(run(adopted, inputs), expected)


def test_too_little_memory_leaves_the_module_whole(model):
    inputs = inputs_of()
    model.to(DEVICE)
    expected = run(model, inputs)
    model.to("cpu")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(2e8 / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            stream(model, device="cuda", vram_limit=int(4e8))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert streamed(model) is None
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)
    assert torch.equal(run(model, inputs), expected)


def test_running_out_of_memory_in_a_step(model):
    inputs = inputs_of()
    stream(model, device="cuda", on_call=("img_mod", "txt_mod"))
    table = tabulated(model)
    expected = run(model, inputs, table)
    stream(model, device="cuda", vram_limit=plan_stream(model, None).smallest_overlapping_bytes)

    def out_of_memory(*_):
        torch.empty(2**42, device=DEVICE)

    handle = model.transformer_blocks[3].register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, inputs, table)
    handle.remove()
    inner = model.transformer_blocks[3].attn.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, inputs, table)
    inner.remove()
    for _ in range(2):
        assert torch.equal(run(model, inputs, table), expected)
