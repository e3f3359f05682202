import pytest
import torch
from fused_cases import DTYPES, random, relative, tolerance

from diffusers_qwenimage.kernels import matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (2, 7, 48), (1, 1, 100)])
def test_linear_gelu(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(64, shape[-1], dtype=dtype, seed=1) / 8
    bias = random(64, dtype=dtype, seed=2)
    with torch.no_grad():
        got = matmul.linear_gelu(x, weight, bias)
    # GELU's input may be rounded too
    assert relative(got, matmul.linear_gelu_reference(x, weight, bias)) <= 2 * tolerance(dtype)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    with torch.no_grad():
        assert relative(matmul.linear_gelu(strided, weight, bias), got) <= 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_into_a_part_of_a_buffer(with_bias, dtype):
    x, weight = random(5, 48, dtype=dtype), random(32, 48, dtype=dtype, seed=1) / 8
    bias = random(32, dtype=dtype, seed=2) if with_bias else None
    buffer = random(9, 96, dtype=dtype, seed=3)
    before = buffer.clone()
    with torch.no_grad():
        matmul.linear_into(buffer[2:7, 32:64], x, weight, bias)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert relative(buffer[2:7, 32:64], expected) <= tolerance(dtype)
    before[2:7, 32:64] = buffer[2:7, 32:64]
    assert torch.equal(buffer, before)


def test_gradients_equal_the_reference():
    inputs = random(2, 5, 48), random(64, 48, seed=1) / 8, random(64, seed=2)
    gradients = []
    for function in (matmul.linear_gelu, matmul.linear_gelu_reference):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        gradients.append(torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), leaves))
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-5


def test_operation_is_registered_correctly():
    leaves = [t.requires_grad_() for t in (random(2, 5, 48), random(64, 48, seed=1), random(64, seed=2))]
    torch.library.opcheck(torch.ops.diffusers_qwenimage.linear_gelu, tuple(leaves))
