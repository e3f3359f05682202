"""Whatever fails, wherever: the module is whole afterwards and computes what it should."""

import threading

import pytest
import torch
from offload_cases import NUM_BLOCKS, inject, late_lane, limit_of, run, transformer, transformer_inputs
from peft import LoraConfig

from diffusers_qwenimage import kernels
from diffusers_qwenimage.checkpoint import empty_module, from_tensors
from diffusers_qwenimage.offload import adopt, stream, streamed, unstream
from diffusers_qwenimage.offload.copy_lane import DirectLane
from diffusers_qwenimage.quantize import quantize_

PLACING = (
    "diffusers_qwenimage.offload.state.device_slab",
    "diffusers_qwenimage.offload.placing.device_slab",
    "diffusers_qwenimage.offload.state.add_innermost",
    "diffusers_qwenimage.offload.memory.HostMemory.slab",
    "diffusers_qwenimage.offload.memory.HostMemory.pin",
)


WAYS = {  # blocks or their parts, in 8 bits or not, and a share of the weights that leaves some to stream
    "blocks": (None, False, 0.4),
    "parts": (None, True, 0.4),
    "parts in fp8": ("fp8", True, 0.05),
}


def model_of(way, num_layers=NUM_BLOCKS):
    """A model, and whether its blocks are split."""
    kind, split, _ = WAYS[way]
    model = transformer(num_layers=num_layers)
    if kind is not None:
        quantize_(model, kind)
    return model, split


@pytest.mark.parametrize("target", PLACING)
@pytest.mark.parametrize(
    ("again", "way"),
    [
        (False, "parts in fp8"),
        (True, "parts"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, "blocks"), (True, "blocks"))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, "parts"), (True, "parts in fp8"))),
    ],
)
def test_placing_fails(target, again, way, monkeypatch):
    (model, split), inputs = model_of(way, num_layers=2), transformer_inputs()
    expected = run(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    least, limit = (limit_of(model, share, split=split) for share in (0.0, WAYS[way][2]))
    number, failed = 0, True
    while failed:
        if again:
            stream(model, device="cpu", vram_limit=least, split=split)
        number += 1
        with monkeypatch.context() as patch:
            fails = inject(patch, target, number, torch.OutOfMemoryError("injected"))
            try:
                stream(model, device="cpu", vram_limit=limit, split=split)
            except torch.OutOfMemoryError:
                assert streamed(model) is None
                assert not any(
                    hasattr(part, "forward") and "forward" in vars(part) for part in model.modules()
                )
        failed = fails.failed
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        assert torch.equal(run(model, inputs), expected)
        unstream(model)
    assert number > 1


@pytest.mark.parametrize("target", PLACING)
def test_adopting_fails(target, monkeypatch):
    full, inputs = transformer(), transformer_inputs()
    expected, weights = run(full, inputs), from_tensors(full.state_dict())
    limit = limit_of(full, 0.4)
    model = empty_module(transformer)
    target = target.replace("placing", "adopt")
    number, failed = 0, True
    while failed:
        number += 1
        with monkeypatch.context() as patch:
            fails = inject(patch, target, number, MemoryError("injected"))
            try:
                adopt(model, weights, device="cpu", vram_limit=limit)
            except MemoryError:
                assert streamed(model) is None
                if "add_innermost" in target:
                    break  # all weights have arrived by then
                assert all(parameter.is_meta for parameter in model.parameters())
        failed = fails.failed
    if "add_innermost" in target:
        stream(model, device="cpu", vram_limit=limit)
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("way", ["blocks", "parts in fp8"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_copy_fails(error, num_slots, way, monkeypatch):
    (model, split), inputs = model_of(way), transformer_inputs()
    expected = run(model, inputs)
    limit = limit_of(model, 0.0, split=split)
    stream(model, device="cpu", vram_limit=3 * limit, num_slots=num_slots, split=split)
    for number in range(1, 12):
        with monkeypatch.context() as patch:
            inject(patch, "diffusers_qwenimage.offload.copy_lane.DirectLane.copy", number, error)
            for _ in range(2):
                try:
                    assert torch.equal(run(model, inputs), expected)
                except type(error):
                    pass
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("kind", [None, pytest.param("fp8", marks=pytest.mark.slow)])
def test_an_operation_between_the_parts_of_a_block_fails(kind, monkeypatch):
    """On the fused path, which reads weights without calling the parts, and writes over its stream."""
    model, inputs = model_of("parts" if kind is None else "parts in fp8")[0], transformer_inputs()
    model.save_memory()
    targets = [
        f"diffusers_qwenimage.fused_parts.{name}" for name in ("attention_norm", "_attention", "visit")
    ]
    with kernels.use_backend("reference"), late_lane(monkeypatch, model):
        expected = run(model, inputs)
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0, split=True), split=True)
        for target in [*targets, "diffusers_qwenimage.fused_parts.second_norm"]:
            for number in (1, 2, 5):
                with monkeypatch.context() as patch:
                    fails = inject(patch, target, number, torch.OutOfMemoryError("injected"))
                    with pytest.raises(torch.OutOfMemoryError):
                        run(model, inputs)
                    assert fails.failed
                assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("injected"), KeyboardInterrupt()])
def test_a_block_fails(error, with_gradient, monkeypatch):
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if with_gradient:
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        model.enable_gradient_checkpointing()
        model.train()

    def fail(*_):
        raise error

    with late_lane(monkeypatch, model):
        stream(model, device="cpu", vram_limit=limit_of(model, 0.0), num_slots=1)
        for block in model.transformer_blocks:
            for place in (block, block.attn, block.img_mlp, block.txt_mlp.net[2]):
                handle = place.register_forward_pre_hook(fail)
                with pytest.raises(type(error)):
                    if with_gradient:
                        model(**inputs).sample.mean().backward()
                    else:
                        run(model, inputs)
                handle.remove()
                state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
                assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
            assert torch.equal(run(model, inputs), expected)
            if with_gradient:
                model(**inputs).sample.mean().backward()


def test_refused_budgets_change_nothing():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    smallest = limit_of(model, 0.0, split=None)
    with pytest.raises(ValueError, match=f"at least {smallest:,} bytes"):
        stream(model, device="cpu", vram_limit=smallest - 1)
    assert streamed(model) is None
    plan = stream(model, device="cpu", vram_limit=smallest)
    with pytest.raises(ValueError, match="at least"):
        stream(model, device="cpu", vram_limit=10)
    assert streamed(model) is plan
    assert torch.equal(run(model, inputs), expected)


def test_threads_with_a_model_each():
    models = [transformer(seed=seed) for seed in range(4)]
    inputs = transformer_inputs()
    expected = [run(model, inputs) for model in models]
    for model in models:
        stream(model, device="cpu", vram_limit=limit_of(model, 0.1))
    results = [[] for _ in models]

    def work(index):
        for _ in range(5):
            results[index].append(run(models[index], inputs))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        assert len(got) == 5 and all(torch.equal(result, want) for result in got)


def test_two_threads_in_one_model_are_told():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    # Whole blocks: between parts of a block nobody is inside of one, and the other thread's run is right too.
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0), split=False)
    errors = []

    def run_too(*_):
        def work():
            try:
                run(model, inputs)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    handle = model.transformer_blocks[2].attn.register_forward_pre_hook(run_too)
    assert torch.equal(run(model, inputs), expected)
    handle.remove()
    assert len(errors) == 1 and "one thread at a time" in errors[0]
    assert torch.equal(run(model, inputs), expected)


def test_direct_lane_is_what_a_cpu_gets():
    model = transformer()
    stream(model, device="cpu", vram_limit=limit_of(model, 0.0))
    assert isinstance(vars(model)["_diffusers_qwenimage_stream"]._lane, DirectLane)
