"""The transformer on a GPU, where attention and matrix products take other kernels."""

import pytest
import torch
from components import FAMILY, random, transformer_inputs, transformers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def on_gpu(inputs, dtype):
    return {
        key: value.to("cuda", dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_against_diffusers(name, dtype):
    config, shapes = FAMILY[name]
    ours, stock = (model.to("cuda", dtype) for model in transformers(**config))
    inputs = on_gpu(transformer_inputs(shapes, kind="use_additional_t_cond" in config), dtype)
    with torch.no_grad():
        # Real against complex arithmetic: the GPU may fuse a product and a sum, one rounding less.
        difference = (ours(**inputs).sample - stock(**inputs).sample).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else 0.05)


def test_offloaded_modulation_visits_the_gpu():
    ours, _ = transformers()
    ours.to("cuda")
    inputs = on_gpu(transformer_inputs([(1, 4, 6)]), torch.float32)
    with torch.no_grad():
        expected = ours(**inputs).sample
        before = torch.cuda.memory_allocated()
        ours.offload_modulation("cpu")
        assert torch.cuda.memory_allocated() < before
        assert ours.modulation_is_offloaded
        table = ours.tabulate_modulation(inputs["timestep"], dtype=torch.float32)
        assert torch.equal(ours(**inputs, modulation=table.at(0)).sample, expected)
        ours.load_modulation()
        assert torch.equal(ours(**inputs).sample, expected)


def test_packed_text_equals_masked_text():
    ours, stock = (model.to("cuda", torch.bfloat16) for model in transformers())
    inputs = on_gpu(transformer_inputs([(1, 8, 8)], 2), torch.bfloat16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7], device="cuda")
    text = inputs["encoder_hidden_states"]
    with torch.no_grad():
        expected = stock(**inputs, encoder_hidden_states_mask=mask).sample
        got = ours(**{**inputs, "encoder_hidden_states": [text[0, :4], text[1]]}).sample
    assert (got - expected).norm() / expected.norm() < 0.02  # bf16 noise


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside its compiler
def test_regional_compile():
    ours, _ = transformers()
    ours.to("cuda", torch.bfloat16)
    inputs = on_gpu(transformer_inputs([(1, 8, 8)]), torch.bfloat16)
    texts = [random(length, 16, seed=length).to("cuda", torch.bfloat16) for length in (3, 9)]
    packed = on_gpu(transformer_inputs([(1, 8, 8)], 2), torch.bfloat16)
    packed["encoder_hidden_states"] = texts
    with torch.no_grad():
        expected = [ours(**inputs).sample, ours(**packed).sample]
        ours.compile_repeated_blocks(fullgraph=True)
        got = [ours(**inputs).sample, ours(**packed).sample]
    for a, b in zip(expected, got, strict=True):
        assert (a - b).norm() / a.norm() < 0.02  # the compiler fuses in fp32 what eager rounds to bf16
