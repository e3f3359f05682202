"""Weights from files straight to where they will live, and weights that stay in the file."""

import copy
import mmap

import pytest
import torch
from offload_cases import (
    empty,
    late_lane,
    limit_of,
    run,
    text_encoder,
    text_inputs,
    transformer,
    transformer_inputs,
)

from diffusers_qwenimage.checkpoint import empty_module, from_tensors, open_checkpoint
from diffusers_qwenimage.files import write_safetensors
from diffusers_qwenimage.offload import adopt, pinned_bytes, plan_stream, rest, stream, streamed, unstream
from diffusers_qwenimage.offload.mapped import NUM_BUFFERS
from diffusers_qwenimage.quantize import quantize_

SHARES = (0.0, 0.3, 0.6, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformer")
    transformer().save_pretrained(path, max_shard_size="600KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.mark.parametrize("source", ["pinned", "mapped"])
@pytest.mark.parametrize("share", SHARES)
def test_equal_to_loading_and_streaming(folder, share, source, monkeypatch):
    full, inputs = transformer(), transformer_inputs()
    expected = run(full, inputs)
    model, weights = empty(folder)
    steps = []
    with late_lane(monkeypatch, model):
        plan = adopt(
            model,
            weights,
            device="cpu",
            vram_limit=limit_of(model, share),
            source=source,
            progress=lambda done, total: steps.append((done, total)),
        )
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
        rest(model)
        assert torch.equal(run(model, inputs), expected)
        assert steps == sorted(steps) and steps[-1][0] > 0.9 * steps[-1][1]
        assert plan.source == source and streamed(model) is plan
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in full.state_dict().items())
        unstream(model)
    assert torch.equal(run(model, inputs), expected)


def test_cast_on_the_way(folder):
    full, inputs = transformer(torch.bfloat16), transformer_inputs(torch.bfloat16)
    model, weights = empty(folder, torch.bfloat16)
    adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.3))
    assert torch.equal(run(model, inputs), run(full, inputs))


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8-storage"])
def test_quantised_on_the_way(folder, kind):
    full, inputs = transformer(torch.bfloat16), transformer_inputs(torch.bfloat16)
    quantize_(full, kind)
    model, weights = empty(folder, torch.bfloat16)
    quantize_(model, kind)
    adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.2))
    assert torch.equal(run(model, inputs), run(full, inputs))


def test_quantised_weights_that_fit_are_taken_as_they_are(tmp_path):
    full, inputs = transformer(torch.bfloat16), transformer_inputs(torch.bfloat16)
    quantize_(full, "fp8")
    write_safetensors(tmp_path / "model.safetensors", full.state_dict())
    model = empty_module(transformer).to(torch.bfloat16)
    quantize_(model, "fp8")
    adopt(
        model, open_checkpoint(tmp_path / "model.safetensors"), device="cpu", vram_limit=limit_of(model, 0.2)
    )
    assert torch.equal(run(model, inputs), run(full, inputs))


def test_text_encoder_with_buffers_that_no_file_holds():
    full, inputs = text_encoder(), text_inputs()
    model = empty_module(text_encoder)
    adopt(model, from_tensors(full.state_dict()), device="cpu", vram_limit=limit_of(full, 0.3))
    assert torch.equal(run(model, inputs), run(full, inputs))


def test_mapped_weights_stay_in_the_file(folder):
    model, weights = empty(folder)
    plan = adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), source="mapped")
    assert plan.pinned_bytes == NUM_BUFFERS * max(b.streamed_bytes for b in plan.blocks)  # small ones
    assert pinned_bytes(model) == plan.pinned_bytes
    weight = model.transformer_blocks[0].img_mlp.net[2].weight
    mapping = weight.untyped_storage()
    assert mapping.nbytes() >= weight.nbytes and isinstance(mmap.PAGESIZE, int)
    run(model, transformer_inputs())
    assert weight.data_ptr() % mmap.PAGESIZE or weight.data_ptr() % 8 == 0


def test_mapped_weights_can_be_changed_in_memory(folder, monkeypatch):
    """The mapping is private: a fused LoRA changes this process's pages, not the file."""
    model, weights = empty(folder)
    inputs, other = transformer_inputs(), transformer(seed=5)
    with late_lane(monkeypatch, model):
        adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), source="mapped")
        run(model, inputs)
        model.load_state_dict(other.state_dict())
        assert torch.equal(run(model, inputs), run(other, inputs))
        unstream(model)
    again, weights = empty(folder)
    adopt(again, weights, device="cpu")
    assert torch.equal(run(again, inputs), run(transformer(), inputs))


def test_mapped_weights_are_not_converted(folder):
    model, weights = empty(folder, torch.bfloat16)
    with pytest.raises(ValueError, match="stored as F32 and needed as torch.bfloat16"):
        adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), source="mapped")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_reading_that_fails_is_told_and_survived(folder, monkeypatch):
    model, weights = empty(folder)
    inputs = transformer_inputs()
    adopt(model, weights, device="cpu", vram_limit=limit_of(model, 0.0), source="mapped")
    expected = run(model, inputs)

    def fail(*_, **__):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_qwenimage.offload.copy_lane.DirectLane.copy", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                for _ in range(2):
                    run(model, inputs)
    assert torch.equal(run(model, inputs), expected)


def test_files_that_do_not_fit_change_nothing(folder):
    model, weights = empty(folder)
    names = list(weights.tensors)
    for wrong in (
        weights.select(names[1:]),
        weights.renamed({**dict(zip(names, names, strict=True)), names[0]: "x"}),
    ):
        with pytest.raises(ValueError, match="missing|unknown"):
            adopt(model, wrong, device="cpu", vram_limit=limit_of(model, 0.0))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert streamed(model) is None


def test_from_memory_to_mapped_and_back():
    model, inputs = transformer(), transformer_inputs()
    expected = run(copy.deepcopy(model), inputs)
    for source in ("mapped", "pinned", "mapped"):
        plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.2), source=source)
        assert plan.source == source
        for _ in range(2):
            assert torch.equal(run(model, inputs), expected)
    plan_stream(model, None)
    unstream(model)
    assert torch.equal(run(copy.deepcopy(model), inputs), expected)
