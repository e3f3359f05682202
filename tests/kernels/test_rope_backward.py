import pytest
import torch
from fused_cases import DEVICE, DTYPES, TRITON, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import rope, use_backend
from diffusers_qwenimage.kernels.rope_backward import (
    norm_rotate_backward,
    norm_rotate_backward_reference,
    norm_rotate_to,
)

SHAPES = [(1, 1, 16), (5, 3, 8), (4, 24, 128), (3, 2, 12)]


def values(shape, dtype):
    num_tokens, num_heads, head_dim = shape
    qkv = random(num_tokens, 3, num_heads, head_dim, dtype=dtype)
    weights = [1 + random(head_dim, dtype=dtype, seed=seed) / 4 for seed in (1, 2)]
    angle = random(num_tokens, head_dim // 2, seed=3)
    return qkv, *weights, torch.stack([angle.cos(), angle.sin()], dim=-1)


def gradients(shape, dtype):
    """As attention returns them: [H, N, head_dim] in memory."""
    num_tokens, num_heads, head_dim = shape
    return tuple(
        random(num_heads, num_tokens, head_dim, dtype=dtype, seed=seed).transpose(0, 1) for seed in (4, 5, 6)
    )


@pytest.mark.parametrize("backend", ["reference", pytest.param(TRITON, marks=needs_triton)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_one_in_place(shape, dtype, backend):
    qkv, *rest = values(shape, dtype)
    with use_backend(backend):
        turned = torch.empty_like(qkv[:, :2])
        norm_rotate_to(turned, qkv, *rest)
        expected = rope.norm_rotate(qkv, *rest)[:, :2]
    if backend == TRITON and DEVICE == "cuda":  # the compiler joins other products and sums in each kernel
        limit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(turned, expected, rtol=limit, atol=limit * float(expected.abs().max()))
    else:
        assert torch.equal(turned, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_autograd(shape):
    qkv, *rest = values(shape, torch.float32)
    leaf = qkv.clone().requires_grad_()
    query, key, value = gradients(shape, torch.float32)
    with use_backend("reference"):
        turned = rope.norm_rotate_reference(leaf, *rest)
    (turned * torch.stack([query, key, value], dim=1)).sum().backward()
    out = torch.empty_like(qkv)
    norm_rotate_backward_reference(out, qkv, *rest, (query, key, value))
    assert relative(out, leaf.grad) < 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference(shape, dtype):
    qkv, *rest = values(shape, dtype)
    ours, theirs = torch.empty_like(qkv), torch.empty_like(qkv)
    with use_backend(TRITON):
        norm_rotate_backward(ours, qkv, *rest, gradients(shape, dtype))
    norm_rotate_backward_reference(theirs, qkv, *rest, gradients(shape, dtype))
    assert relative(ours, theirs) <= tolerance(dtype)
