import pytest
import torch
from fused_cases import DEVICE, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import few, use_backend

# Triton's interpreter multiplies the bit patterns of bf16 matrices.
HALF = [torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setattr(few, "most_tokens", 256)


@needs_triton
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("num_rows", [1, 17, 140])
@pytest.mark.parametrize("sizes", [(64, 48), (512, 96)])
def test_equals_the_reference(sizes, num_rows, with_gelu, dtype):
    inputs, outputs = sizes
    x, weight = (
        random(num_rows, inputs, dtype=dtype),
        random(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5,
    )
    bias = random(outputs, dtype=dtype, seed=2)
    assert few.fits(x, weight)
    buffer = random(num_rows + 2, outputs + 8, dtype=dtype, seed=3)
    before = buffer.clone()
    expected = few.few_linear_reference(x.float(), weight.float(), bias.float(), with_gelu)
    with use_backend("triton"):
        got = few.few_linear(x, weight, bias, with_gelu=with_gelu)
        few.few_linear(x, weight, bias, buffer[1:-1, :outputs], with_gelu=with_gelu)
    assert relative(got, expected) <= 2 * tolerance(dtype)
    assert torch.equal(buffer[1:-1, :outputs], got)
    before[1:-1, :outputs] = got
    assert torch.equal(buffer, before)


def test_work_is_split_where_there_are_few_outputs():
    assert few.tiles_for(3072, 9216).splits == 1 and few.tiles_for(3072, 12288).splits == 1
    assert few.tiles_for(3072, 3072).splits == 4 == few.tiles_for(12288, 3072).splits
    assert few.tiles_for(64, 48).splits == 1 and few.tiles_for(512, 96).splits == 8
    for inputs, outputs in ((3072, 3072), (12288, 3072), (512, 96), (192, 64)):
        cut = few.tiles_for(inputs, outputs)
        assert inputs % (cut.splits * cut.depth) == 0


def test_what_it_does_not_take():
    x, weight = random(4, 64, dtype=torch.bfloat16), random(8, 64, dtype=torch.bfloat16)
    assert few.fits(x, weight)
    for bad in (x.float(), x[:, ::2], x[:0], torch.zeros(257, 64, dtype=torch.bfloat16, device=DEVICE)):
        assert not few.fits(bad, weight)
    assert not few.fits(x, weight.half()) and not few.fits(x, weight.t().contiguous().t())
