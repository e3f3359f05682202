"""Weights that stream from their files at first, and are pinned meanwhile: always the same results."""

import copy
import gc
import logging
import threading
import time
import weakref

import pytest
import torch
from offload_cases import (
    LateLane,
    empty,
    inject,
    late_lane,
    limit_of,
    run,
    transformer,
    transformer_inputs,
)
from peft import LoraConfig

from diffusers_qwenimage.checkpoint import from_tensors, open_checkpoint
from diffusers_qwenimage.files import write_safetensors
from diffusers_qwenimage.offload import (
    Pinner,
    adopt,
    fetched_bytes,
    finish_pinning,
    mapped,
    pinned_bytes,
    pinning,
    rest,
    stream,
    streamed,
    unpinned_bytes,
    unstream,
)
from diffusers_qwenimage.offload.layout import LARGE, PAGE, Spec, layout_of
from diffusers_qwenimage.offload.memory import HostMemory
from diffusers_qwenimage.offload.state import state_of
from diffusers_qwenimage.quantize import quantize_


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    transformer().save_pretrained(path, max_shard_size="600KB")
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(mapped, "BUFFER_BYTES", 10_000)


class Gate(HostMemory):
    """Memory that is given slab by slab, as a test allows it."""

    def __init__(self, device):
        super().__init__(device)
        self.allowed, self.asked = threading.Semaphore(0), 0

    def slab(self, num_bytes):
        self.asked += 1
        self.allowed.acquire()
        return super().slab(num_bytes)


def waiting(folder):
    """A model whose streamed weights are in files."""
    model, weights = empty(folder)
    adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), split=False, pinner=Pinner())
    return model


def gated(folder, monkeypatch):
    """The same; with it, what lets the pinner go on."""
    gates = []

    def make(device):
        gates.append(Gate(device))
        return gates[-1]

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_qwenimage.offload.state.HostMemory", make)
        model = waiting(folder)
    return model, gates[0]


def let(gate, model, count):
    """Let the pinner fill some slabs, and wait for them."""
    job = state_of(model)._pinning
    filled = len(job._filled) + count
    for _ in range(count):
        gate.allowed.release()
    wait_until(lambda: len(job._filled) >= filled)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def in_slabs(model):
    return [unit.slab is not None for unit in state_of(model)._units]


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_results_are_the_same_all_the_while(share, num_slots, folder, monkeypatch):
    full, inputs = transformer(), transformer_inputs()
    expected = run(full, inputs)
    model, weights = empty(folder)
    with late_lane(monkeypatch, model):
        limit = limit_of(model, share) + (num_slots - 1) * 151_000
        gate = Gate(torch.device("cpu"))
        monkeypatch.setattr("diffusers_qwenimage.offload.state.HostMemory", lambda device: gate)
        plan = adopt(model, weights, device="cpu", vram_limit=limit, num_slots=num_slots, pinner=Pinner())
        assert plan.source == "pinned" and unpinned_bytes(model) == plan.streamed_bytes > 0
        assert pinned_bytes(model) == mapped.buffer_bytes(10**9)
        count = len(in_slabs(model))
        assert torch.equal(run(model, inputs), expected)
        assert gate.asked == 0  # not in the first pass
        for done in range(count + 1):
            assert torch.equal(run(model, inputs), expected)
            assert sum(in_slabs(model)) == done
            if done < count:
                let(gate, model, 1)
        assert unpinned_bytes(model) == 0 and pinned_bytes(model) == plan.pinned_bytes
        assert fetched_bytes(model) > 0
        rest(model)
        assert torch.equal(run(model, inputs), expected)
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in full.state_dict().items())


def test_waiting_for_it(folder):
    expected, inputs = run(transformer(), transformer_inputs()), transformer_inputs()
    for passes in range(3):
        model = waiting(folder)
        for _ in range(passes):
            run(model, inputs)
        finish_pinning(model)
        assert unpinned_bytes(model) == 0 and all(in_slabs(model))
        assert pinned_bytes(model) == streamed(model).pinned_bytes
        finish_pinning(model)
        assert torch.equal(run(model, inputs), expected)


def test_waiting_during_a_visit_is_refused(folder):
    model = waiting(folder)
    errors = []

    def wait(*_):
        with pytest.raises(RuntimeError, match="between calls") as caught:
            finish_pinning(model)
        errors.append(caught)

    model.transformer_blocks[1].attn.register_forward_pre_hook(wait)
    run(model, transformer_inputs())
    assert len(errors) == 1


def test_tensors_leave_the_files(folder, monkeypatch):
    model, gate = gated(folder, monkeypatch)
    inputs = transformer_inputs()
    weight = model.transformer_blocks[0].img_mlp.net[2].weight
    before = weight.data_ptr()
    file_pages = weakref.ref(state_of(model)._units[0].homes[0])
    run(model, inputs)
    run(model, inputs)
    assert weight.data_ptr() == before
    let(gate, model, 1)
    rest(model)
    assert weight.data_ptr() != before and in_slabs(model)[0]
    gc.collect()
    assert file_pages() is None
    let_all(gate)


def let_all(gate):
    for _ in range(100):
        gate.allowed.release()


CHANGES = {
    "load": lambda model, other: model.load_state_dict(other.state_dict()),
    "assign": lambda model, other: model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "in place": lambda model, other: [
        parameter.data.copy_(theirs)
        for parameter, theirs in zip(model.parameters(), other.parameters(), strict=True)
    ],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("done", [0, 2, 5])
def test_weights_that_change_meanwhile(change, done, folder, monkeypatch):
    """Between their copy to pinned memory and the moment when it takes their place, and elsewhere."""
    model, gate = gated(folder, monkeypatch)
    inputs, other = transformer_inputs(), transformer(seed=5)
    run(model, inputs)
    run(model, inputs)
    let(gate, model, done)
    with torch.no_grad():
        CHANGES[change](model, other)
    expected = run(other, inputs)
    assert torch.equal(run(model, inputs), expected)
    let_all(gate)
    finish_pinning(model)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("done", [0, 3])
def test_lora_fused_meanwhile(done, folder, monkeypatch):
    inputs = transformer_inputs()
    model, gate = gated(folder, monkeypatch)
    models = [transformer(), model]
    for each in models:
        torch.manual_seed(3)
        each.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
        run(each, inputs)
        run(each, inputs)
    let(gate, model, done)
    for each in models:
        each.fuse_lora(0.7)
    for _ in range(2):
        assert torch.equal(run(model, inputs), run(models[0], inputs))
    let_all(gate)
    finish_pinning(model)
    assert torch.equal(run(model, inputs), run(models[0], inputs))
    for each in models:
        each.unfuse_lora()
    assert torch.equal(run(model, inputs), run(models[0], inputs))


@pytest.mark.parametrize("done", [0, 2])
def test_training_meanwhile(done, folder, monkeypatch):
    def gradients(model):
        model.zero_grad()
        model(**transformer_inputs()).sample.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model, gate = gated(folder, monkeypatch)
    models = [transformer(), model]
    for each in models:
        torch.manual_seed(3)
        each.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        each.enable_gradient_checkpointing()
        each.train()
    expected = gradients(models[0])
    for _ in range(2):
        got = gradients(model)
        assert len(got) == len(expected) > 0 and all(map(torch.equal, got, expected))
        let(gate, model, done)
    let_all(gate)
    finish_pinning(model)
    assert all(map(torch.equal, gradients(model), expected))


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("end", ["unstream", "save", "other budget", "other budget, later", "mapped"])
def test_what_ends_it(end, done, folder, monkeypatch, tmp_path):
    expected, inputs = run(transformer(), transformer_inputs()), transformer_inputs()
    model, gate = gated(folder, monkeypatch)
    run(model, inputs)
    run(model, inputs)
    let(gate, model, done)
    let_all(gate)
    limit = limit_of(model, 0.3)
    if end == "unstream":
        unstream(model)
        assert streamed(model) is None and unpinned_bytes(model) == pinned_bytes(model) == 0
    elif end == "save":
        model.save_pretrained(tmp_path)
        model, weights = empty(tmp_path)
        adopt(model, weights, device="cpu")
    elif end == "mapped":
        stream(model, device="cpu", vram_limit=limit, source="mapped")
        assert unpinned_bytes(model) == 0
    else:
        pinner = Pinner() if "later" in end else None
        stream(model, device="cpu", vram_limit=limit, pinner=pinner)
        assert pinner is not None or unpinned_bytes(model) == 0
        assert torch.equal(run(model, inputs), expected)
        finish_pinning(model)
        assert unpinned_bytes(model) == 0
    for _ in range(2):
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("target", ["HostMemory.slab", "HostMemory.pin_part"])
@pytest.mark.parametrize("error", [MemoryError("injected"), RuntimeError("injected")])
def test_what_cannot_be_pinned_stays_in_its_file(target, error, folder, monkeypatch, caplog):
    expected, inputs = run(transformer(), transformer_inputs()), transformer_inputs()
    for number in range(1, 6):
        model = waiting(folder)
        run(model, inputs)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            patch.setattr(pinning, "WORKERS", 1)  # so that something is left
            inject(patch, f"diffusers_qwenimage.offload.memory.{target}", number, error)
            finish_pinning(model)
        assert "No more host memory can be pinned (injected)" in caplog.text
        assert unpinned_bytes(model) > 0
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
        finish_pinning(model)
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0))  # asks for it again
        assert unpinned_bytes(model) == 0
        assert torch.equal(run(model, inputs), expected)


def test_a_visit_that_fails_meanwhile(folder, monkeypatch):
    expected, inputs = run(transformer(), transformer_inputs()), transformer_inputs()
    model, gate = gated(folder, monkeypatch)

    def fail(*_):
        raise torch.OutOfMemoryError("injected")

    for number in range(6):
        run(model, inputs)
        if 0 < number:
            let(gate, model, 1 if number < 5 else 0)
        handle = model.transformer_blocks[number % 5].attn.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            run(model, inputs)
        handle.remove()
        assert torch.equal(run(model, inputs), expected)
    let_all(gate)


def test_a_model_that_is_dropped_is_not_pinned(folder, monkeypatch):
    model, gate = gated(folder, monkeypatch)
    inputs = transformer_inputs()
    run(model, inputs)
    run(model, inputs)
    pinner = state_of(model)._pinning._pinner
    thread = pinner._thread
    assert thread is not None
    del model
    gc.collect()
    gate.allowed.release()
    thread.join(5)
    assert not thread.is_alive() and gate.asked == 1


def test_the_last_one_added_is_the_first(folder):
    pinner = Pinner()
    inputs = transformer_inputs()
    models = []
    for _ in range(2):
        model, weights = empty(folder)
        adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), pinner=pinner)
        models.append(model)
    first, second = models
    for _ in range(3):
        run(first, inputs)
    assert pinner._thread is None
    for _ in range(2):
        run(second, inputs)
    for model in reversed(models):
        wait_until(lambda model=model: not state_of(model)._pinning.is_waiting)
    pinner.stop()
    for model in models:
        rest(model)
        assert unpinned_bytes(model) == 0


def test_what_is_converted_is_pinned_at_once(folder, tmp_path):
    inputs = transformer_inputs(torch.bfloat16)
    full = transformer(torch.bfloat16)
    model, weights = empty(folder, torch.bfloat16)  # the file has fp32
    adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), pinner=Pinner())
    assert unpinned_bytes(model) == 0 and torch.equal(run(model, inputs), run(full, inputs))
    in_memory, _ = empty(folder)
    state = from_tensors(transformer().state_dict())
    adopt(in_memory, state, device="cpu", vram_limit=limit_of(in_memory, 0.0), pinner=Pinner())
    assert unpinned_bytes(in_memory) == 0
    quantize_(full, "fp8")
    write_safetensors(tmp_path / "model.safetensors", full.state_dict())
    model, weights = empty(folder, torch.bfloat16)
    quantize_(model, "fp8")
    adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), pinner=Pinner())
    assert unpinned_bytes(model) == 0 and torch.equal(run(model, inputs), run(full, inputs))


def test_some_blocks_can_be_converted(folder, tmp_path):
    """Some blocks wait in the file and others do not, in their order."""
    full, inputs = transformer(torch.bfloat16), transformer_inputs(torch.bfloat16)
    state = full.state_dict()
    for name in state:
        if ".1." in name[:22] or ".3." in name[:22]:
            state[name] = state[name].float()
    write_safetensors(tmp_path / "model.safetensors", state)
    model, _ = empty(folder, torch.bfloat16)
    weights = open_checkpoint(tmp_path / "model.safetensors")
    limit = limit_of(model, 0.0)
    adopt(model, weights, device="cpu", vram_limit=limit, split=False, pinner=Pinner())
    assert in_slabs(model) == [False, True, False, True, False]
    for _ in range(3):
        assert torch.equal(run(model, inputs), run(full, inputs))
    finish_pinning(model)
    assert torch.equal(run(model, inputs), run(full, inputs))


def test_slabs_are_cut_at_pages_and_never_in_a_tensor():
    large, small = Spec((LARGE,), torch.uint8), Spec((100,), torch.uint8)
    layout = layout_of([[small], [large, large], [small], [large], [large, small]])
    assert [layout.offsets[i] % PAGE for i in (1, 4, 5)] == [0, 0, 0]
    assert layout.offsets[2] == layout.offsets[1] + LARGE
    parts = layout.parts(LARGE)
    assert [list(part.tensors) for part in parts] == [[0, 1], [2], [3, 4], [5], [6]]
    assert parts[0].start == 0 and parts[-1].end == layout.num_bytes
    for part, following in zip(parts, parts[1:], strict=False):
        assert part.end == following.start and part.end % PAGE == 0
    assert len(layout.parts(10**9)) == 1


def test_copies_go_part_by_part(monkeypatch):
    copied = []
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    original = LateLane.copy

    def copy_(self, target, source, **marks):
        copied.append(source.numel())
        original(self, target, source, **marks)

    monkeypatch.setattr(LateLane, "copy", copy_)
    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1)
        for unit in state_of(model)._units:
            size = unit.layout.num_bytes
            unit.slab.parts = [(0, 4096), (4096, size)]
        for _ in range(2):
            assert torch.equal(run(model, inputs), expected)
    assert set(copied) == {4096, size - 4096}
