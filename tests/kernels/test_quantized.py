import pytest
import torch
from fused_cases import DEVICE, DTYPES, TRITON, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import norm, quantized, rows, use_backend
from diffusers_qwenimage.kernels.int8 import int8_linear
from diffusers_qwenimage.kernels.rows import FP8, Rows, Target

TARGETS = [Target(FP8), Target(torch.int8), Target(torch.int8, 16)]
# Tokens, inputs: odd, one, no multiple of a power of two.
SHAPES = [(1, 16), (7, 48), (3, 112), (5, 3072), (0, 32)]


def fp8_runs_here(dtype):
    return dtype != FP8 or DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def same(got, expected):
    """Codes may differ by one step where a value lies on the border between two, which is rare."""
    assert got.values.dtype == expected.values.dtype and got.scale.shape == expected.scale.shape
    if not got.values.numel():
        return
    assert relative(got.scale, expected.scale) < 1e-5
    a, b = got.values.float(), expected.values.float()
    if DEVICE == "cpu" and got.values.dtype == FP8:  # the interpreter loses the carry into the exponent
        a = torch.where(2 * a == b, b, a)
    step = 1.0 if got.values.dtype == torch.int8 else b.abs() / 8 + 2**-9
    assert ((a - b).abs() <= step).all() and (a != b).float().mean() < 0.02


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(shape, target, dtype):
    if not fp8_runs_here(target.dtype):
        pytest.skip("this GPU has no fp8")
    x = random(*shape, dtype=dtype)
    x[1:2] = 0
    x[:, 3] *= 50
    for values in (x, torch.cat([x, x], 1)[:, : shape[1]], torch.stack([x, x], -1)[..., 0]):
        with use_backend(TRITON):
            got, gelu = quantized.quantize_rows(values, target), quantized.gelu_quantize(values, target)
        same(got, rows.quantize_rows_reference(x, target))
        same(gelu, rows.gelu_quantize_reference(x, target))
        assert got.values.is_contiguous()


@pytest.mark.parametrize("target", TARGETS)
def test_reference_is_a_rounding_of_the_rows(target):
    x = random(9, 64)
    got = rows.quantize_rows_reference(x, target)
    back = rows.dequantize_reference(*got, torch.float32, target.rotation)
    assert relative(back, x) < {FP8: 0.035, torch.int8: 0.02}[target.dtype]
    assert got.values.float().abs().amax(1).eq(rows.LIMITS[target.dtype]).all()


@pytest.mark.parametrize("block", [0, 1, 4, 16, 64])
def test_rotation_is_its_own_inverse_and_keeps_products(block):
    x, y = random(5, 192), random(4, 192, seed=1)
    turned = rows.rotate_blocks(x, block)
    assert relative(rows.rotate_blocks(turned, block), x) < 1e-6
    assert relative(turned @ rows.rotate_blocks(y, block).t(), x @ y.t()) < 1e-5
    for wrong, message in ((256, "192 values cannot be rotated in blocks of 256"), (32, "power of four")):
        with pytest.raises(ValueError, match=message):
            rows.rotate_blocks(x, wrong)


def test_rotation_is_that_of_comfyui():
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = rows.hadamard(256, torch.device("cpu"))
    assert torch.equal(matrix, torch.kron(torch.kron(four, four), torch.kron(four, four)))
    assert torch.equal(matrix, matrix.t()) and relative(matrix @ matrix, torch.eye(256)) < 1e-6


@needs_triton
@pytest.mark.parametrize("target", [*TARGETS, Target(torch.int8, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(target, dtype):
    if not fp8_runs_here(target.dtype):
        pytest.skip("this GPU has no fp8")
    stored = rows.quantize_rows_reference(random(24, 768), target)
    expected = rows.dequantize_reference(*stored, dtype, target.rotation)
    for weight in (stored.values, torch.stack([stored.values.view(torch.int8)] * 2, -1)[..., 0]):
        with use_backend(TRITON):
            got = quantized.dequantize(weight.view(target.dtype), stored.scale, dtype, target.rotation)
        assert got.dtype == dtype and relative(got, expected) < 5e-3


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("modulations", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_with_quantised_results(modulations, target, dtype):
    if not fp8_runs_here(target.dtype):
        pytest.skip("this GPU has no fp8")
    x, y = random(2, 5, 48, dtype=dtype), random(10, 48, dtype=dtype, seed=1)
    modulation = random(modulations, 6 * 48, dtype=dtype, seed=2)
    index = None if modulations == 1 else (torch.arange(10) % 2).to(torch.int32).to(DEVICE)
    results = {}
    for triton in (True, False):
        with use_backend(TRITON if triton else "reference"):
            results[triton] = (
                norm.attention_norm(x, modulation, index, target, triton),
                *norm.mlp_norm(x, y, modulation, index, target, triton),
                norm.mlp_add(x, y, modulation, index, triton),
                norm.attention_norm(x, modulation, index, None, triton),
            )
    exact = rows.quantize_rows_reference(norm_of(x, modulation, index), target)
    same(results[True][0], exact)
    total = results[True][1]
    same(
        results[True][2], rows.quantize_rows_reference(norm_of(total, modulation[:, 3 * 48 :], index), target)
    )
    for a, b in zip(results[True], results[False], strict=True):
        if isinstance(a, Rows):
            continue  # the kernel quantises before rounding to the type of the tokens, the reference after it
        assert relative(a, b) <= tolerance(dtype)


def norm_of(x, modulation, index):
    """h in fp32, not rounded."""
    shift, scale = modulation.float()[:, :48], modulation.float()[:, 48:96]
    return norm.norm_modulate_reference(x.float(), scale, shift, index).flatten(0, 1)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("sizes", [(64, 48), (40, 136), (128, 128)])
def test_int8_linear(sizes, num_rows, dtype):
    inputs, outputs = sizes
    tokens = rows.quantize_rows_reference(random(num_rows, inputs), Target(torch.int8))
    weight = rows.quantize_rows_reference(random(outputs, inputs, seed=1), Target(torch.int8))
    bias = random(outputs, dtype=dtype, seed=2)
    buffer = random(num_rows + 2, outputs + 8, dtype=dtype, seed=3)
    before = buffer.clone()
    expected = rows.scaled_linear_reference(tokens, *weight, bias, dtype)
    bare = rows.scaled_linear_reference(tokens, *weight, None, dtype)
    out = buffer[1:-1, :outputs]
    int8_linear(*tokens, *weight, bias, dtype, out)
    assert relative(out, expected) < 5e-3
    assert relative(int8_linear(*tokens, *weight, None, dtype), bare) < 5e-3
    before[1:-1, :outputs] = out
    assert torch.equal(buffer, before)


def test_products_of_integers_are_exact():
    limit = torch.full((3, 4104), 127, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(3, 1, device=DEVICE)
    got = rows.scaled_linear_reference(Rows(limit, ones), limit, ones, None, torch.float64)
    assert got.eq(127 * 127 * 4104).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("num_rows", [1, 17, 128, 1000])
@pytest.mark.parametrize("sizes", [(3072, 9216), (12288, 3072)])
@pytest.mark.parametrize("target", [Target(FP8), Target(torch.int8, 256)])
def test_products_on_a_gpu(target, sizes, num_rows):
    if not fp8_runs_here(target.dtype):
        pytest.skip("this GPU has no fp8")
    inputs, outputs = sizes
    tokens = rows.quantize_rows_reference(random(num_rows, inputs), target)
    weight = rows.quantize_rows_reference(random(outputs, inputs, seed=1) / 50, target)
    bias = random(outputs, dtype=torch.bfloat16, seed=2)
    expected = rows.scaled_linear_reference(tokens, *weight, bias, torch.float32)
    joint = torch.zeros(num_rows + 4, outputs, dtype=torch.bfloat16, device=DEVICE)
    with use_backend("auto"):
        quantized.scaled_linear(tokens, *weight, bias, torch.bfloat16, joint[2:-2])
        half = quantized.scaled_linear(tokens, *weight, bias, torch.float16)
    # rounding of the result, and of fp8's sums, whose accumulators keep fewer bits (fast accumulation)
    assert relative(joint[2:-2], expected) < 5e-3 and relative(half, expected) < 5e-3
    assert joint[:2].eq(0).all() and joint[-2:].eq(0).all()
