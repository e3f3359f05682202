import pytest
import torch
from fused_cases import DEVICE, DTYPES, TRITON, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import norm, use_backend

SHAPES = [(1, 1, 16), (1, 7, 48), (2, 5, 96), (1, 3, 3072), (3, 4, 100), (2, 3, 1)]


def arguments(shape, dtype, modulations, *, seed=0):
    """x, y, gate, scale, shift, index, as a chunked modulation gives them: rows with a stride of 6 D."""
    width, tokens = shape[-1], shape[0] * shape[1]
    x, y = random(*shape, dtype=dtype, seed=seed), random(*shape, dtype=dtype, seed=seed + 1)
    shift, scale, gate = random(modulations, 6 * width, dtype=dtype, seed=seed + 2).chunk(6, dim=-1)[:3]
    index = None
    if modulations > 1:
        index = (torch.arange(tokens) % modulations).to(torch.int32).to(DEVICE)
    return x, y, gate, scale, shift, index


def stock(x, y, gate, scale, shift, index):
    """The arithmetic of diffusers' block, one operation after the other."""
    if index is not None:
        gate, scale, shift = (p[index.long()].view(x.shape) for p in (gate, scale, shift))
    total = x + gate * y
    normalised = torch.nn.LayerNorm(x.shape[-1], elementwise_affine=False, eps=1e-6)(total)
    return total, normalised * (1 + scale) + shift


@pytest.mark.parametrize("modulations", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_no_less_exact_than_stock(shape, dtype, modulations):
    inputs = arguments(shape, dtype, modulations)
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    exact, theirs = stock(*wide), stock(*inputs)
    for ours, plain, truth in zip(norm.gate_norm_modulate_reference(*inputs), theirs, exact, strict=True):
        assert ours.dtype == dtype
        # one rounding instead of up to six; 1e-6 where fp32 itself is the limit
        assert relative(ours, truth) <= 1.05 * relative(plain, truth) + 1e-6


@needs_triton
@pytest.mark.parametrize("modulations", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference(shape, dtype, modulations):
    x, y, gate, scale, shift, index = arguments(shape, dtype, modulations)
    with torch.no_grad(), use_backend(TRITON):
        got = (
            *norm.gate_norm_modulate(x, y, gate, scale, shift, index),
            norm.norm_modulate(x, scale, shift, index),
            norm.gate_add(x, y, gate, index),
        )
    expected = (
        *norm.gate_norm_modulate_reference(x, y, gate, scale, shift, index),
        norm.norm_modulate_reference(x, scale, shift, index),
        norm.gate_add_reference(x, y, gate, index),
    )
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative(a, b) <= tolerance(dtype)


@needs_triton
def test_kernel_reads_rows_with_gaps():
    wide = random(2, 6, 96, dtype=torch.float32)
    x, y = wide[:, ::2, :48], wide.transpose(0, 1)[:2, :, :48].expand(2, 2, 48)[:, :1].expand(2, 3, 48)
    assert not x.is_contiguous() and not y.is_contiguous()
    gate, scale, shift = (random(48, 1, dtype=torch.float32, seed=i).t() for i in range(3))
    with torch.no_grad(), use_backend(TRITON):
        got = norm.gate_norm_modulate(x, y, gate, scale, shift)
    for a, b in zip(got, norm.gate_norm_modulate_reference(x, y, gate, scale, shift), strict=True):
        assert relative(a, b) <= tolerance(torch.float32)


@needs_triton
def test_no_tokens():
    x = torch.empty(1, 0, 16, device=DEVICE)
    row = torch.ones(1, 16, device=DEVICE)
    with torch.no_grad(), use_backend(TRITON):
        assert norm.norm_modulate(x, row, row).shape == x.shape


@pytest.mark.parametrize("modulations", [1, 2])
def test_gradients_equal_the_reference(modulations):
    for op, reference, names in (
        (norm.gate_norm_modulate, norm.gate_norm_modulate_reference, "xygst"),
        (norm.norm_modulate, norm.norm_modulate_reference, "xst"),
    ):
        x, y, gate, scale, shift, index = arguments((2, 5, 48), torch.float32, modulations)
        named = {"x": x, "y": y, "g": gate, "s": scale, "t": shift}
        gradients = []
        for function in (op, reference):
            leaves = [named[name].detach().clone().requires_grad_() for name in names]
            outputs = function(*leaves, index)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = sum((o * random(*o.shape, dtype=o.dtype, seed=9 + i)).sum() for i, o in enumerate(outputs))
            gradients.append(torch.autograd.grad(loss, leaves))
        for a, b in zip(*gradients, strict=True):
            assert relative(a, b) < 1e-5


def test_operations_are_registered_correctly():
    x, y, gate, scale, shift, index = arguments((2, 5, 48), torch.float32, 2)
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, gate, scale, shift)]
    torch.library.opcheck(torch.ops.diffusers_qwenimage.gate_norm_modulate, (*leaves, index, 1e-6))
    torch.library.opcheck(
        torch.ops.diffusers_qwenimage.norm_modulate, (leaves[0], leaves[3], leaves[4], index, 1e-6)
    )


def test_compiles():
    x, y, gate, scale, shift, index = arguments((2, 5, 48), torch.float32, 2)

    def chain(*inputs):
        total, h = norm.gate_norm_modulate(*inputs, index)
        return norm.gate_add(total, h, inputs[2], index)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, gate, scale, shift)]
    expected, got = chain(*leaves), compiled(*leaves)
    assert relative(got, expected) < 1e-6
    for a, b in zip(
        torch.autograd.grad(expected.sum(), leaves), torch.autograd.grad(got.sum(), leaves), strict=True
    ):
        assert relative(a, b) < 1e-6
    torch._dynamo.reset()
