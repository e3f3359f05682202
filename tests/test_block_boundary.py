"""A block that computes the next one's first norm gives the same bits as one that leaves it alone."""

import pytest
import torch
from components import FAMILY, random, transformer_inputs
from diffusers.hooks import HookRegistry, ModelHook
from fused_cases import DEVICE, needs_triton
from test_fused import model, moved

from diffusers_qwenimage import kernels
from diffusers_qwenimage.block_boundary import Handover
from diffusers_qwenimage.quantize import quantize_

BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def run(ours, inputs, backend, monkeypatch, **more):
    """The output, after a first call that makes the plans, and how often a norm was handed over."""
    taken = []
    with torch.no_grad(), kernels.use_backend(backend), monkeypatch.context() as patch:
        table = ours.tabulate_modulation(inputs["timestep"][:1], dtype=inputs["hidden_states"].dtype)
        arguments = {**inputs, **more, "modulation": table.at(0)}
        ours(**arguments)
        patch.setattr(Handover, "begin", lambda self, *rest: None)
        expected = ours(**arguments).sample
        patch.undo()
        take = Handover.take

        def counted(self, *arguments):
            normed = take(self, *arguments)
            taken.append(normed is not None)
            return normed

        patch.setattr(Handover, "take", counted)
        got = ours(**arguments).sample
    assert torch.equal(got, expected)
    return sum(taken)


def inputs_of(name, batch=1, dtype=torch.float32, *, packed=False):
    inputs = transformer_inputs(FAMILY[name][1], batch, kind="use_additional_t_cond" in FAMILY[name][0])
    if packed:
        inputs["encoder_hidden_states"] = [random(length, 16, seed=length) for length in (3, 9)]
    inputs["timestep"] = inputs["timestep"][:1].expand(batch)
    return moved(inputs, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["text-to-image", "edit-2511"])
def test_same_bits(name, backend, monkeypatch):
    ours = model(**FAMILY[name][0])
    num_blocks = len(ours.transformer_blocks)
    assert num_blocks > 1
    assert run(ours, inputs_of(name, 2, packed=True), backend, monkeypatch) == num_blocks - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    ours = model(dtype)
    handed = len(ours.transformer_blocks) - 1 if dtype == torch.bfloat16 else 0
    assert run(ours, inputs_of("text-to-image", dtype=dtype), "reference", monkeypatch) == handed


def test_eight_bits(monkeypatch):
    ours = model()
    assert quantize_(ours, "int8")
    inputs = inputs_of("text-to-image")
    assert run(ours, inputs, "reference", monkeypatch) == len(ours.transformer_blocks) - 1


def test_nothing_is_handed_over_where_something_stands_between(monkeypatch):
    ours = model()
    inputs = inputs_of("text-to-image")
    residuals = [random(*inputs["hidden_states"].shape[:2], 48).to(DEVICE)]
    assert run(ours, inputs, "reference", monkeypatch, controlnet_block_samples=residuals) == 0
    registry = HookRegistry.check_if_exists_or_initialize(ours.transformer_blocks[-1])
    registry.register_hook(ModelHook(), "test")
    assert run(ours, inputs, "reference", monkeypatch) == len(ours.transformer_blocks) - 2
    registry.remove_hook("test")
    ours.save_memory()
    assert run(ours, inputs, "reference", monkeypatch) == 0


def test_a_plan_from_before_quantising_is_not_trusted(monkeypatch):
    ours, inputs = model(), inputs_of("text-to-image")
    assert run(ours, inputs, "reference", monkeypatch) == len(ours.transformer_blocks) - 1
    quantize_(ours, "int8")
    with torch.no_grad(), kernels.use_backend("reference"):
        table = ours.tabulate_modulation(inputs["timestep"][:1], dtype=torch.float32)
        first, second = (ours(**inputs, modulation=table.at(0)).sample for _ in range(2))
    assert torch.equal(first, second)
