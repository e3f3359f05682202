import pytest
import torch
from fused_cases import DEVICE, DTYPES, TRITON, needs_triton, random, tolerance

from diffusers_qwenimage.kernels import norm, use_backend
from diffusers_qwenimage.kernels.norm_backward import gate_norm_backward, gate_norm_backward_reference

SHAPES = [(1, 16), (7, 48), (37, 96), (3, 3072), (5, 1)]
PARTS = ("x", "y", "gate", "scale", "shift")


def values(shape, dtype):
    width = shape[-1]
    x, y, grad_total, grad_h = (random(*shape, dtype=dtype, seed=seed) for seed in range(4))
    shift, scale, gate = random(1, 6 * width, dtype=dtype, seed=4)[0].chunk(6)[:3]
    return x, y, gate, scale, shift, grad_total, grad_h


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_autograd(shape, has_gate):
    x, y, gate, scale, shift, grad_total, grad_h = (v.double() for v in values(shape, torch.float32))
    leaves = [v.clone().requires_grad_() for v in (x, y, gate, scale, shift)]
    total = leaves[0] + leaves[2] * leaves[1] if has_gate else leaves[0] * 1
    h = (
        torch.nn.functional.layer_norm(total, total.shape[-1:], eps=norm.EPSILON) * (1 + leaves[3])
        + leaves[4]
    )
    (total * grad_total + h * grad_h).sum().backward()
    gated = (y.float(), gate.float()) if has_gate else ()
    found = gate_norm_backward_reference(
        total.detach().float(), scale.float(), grad_total.float(), grad_h.float(), *gated
    )
    for leaf, name in zip(leaves, PARTS, strict=True):
        if leaf.grad is None:
            assert getattr(found, name) is None
            continue
        # fp32 against fp64; a width of 1 has a variance of 0, which eps turns into a factor of 1000
        torch.testing.assert_close(getattr(found, name), leaf.grad.float(), rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("case", ["both", "norm", "norm, nothing past it", "gate"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_reference(shape, dtype, case):
    x, y, gate, scale, _, grad_total, grad_h = values(shape, dtype)
    arguments = {
        "both": (x, scale, grad_total, grad_h, y, gate),
        "norm": (x, scale, grad_total, grad_h),
        "norm, nothing past it": (x, scale, None, grad_h),
        "gate": (grad_total, None, grad_total, None, y, gate),
    }[case]
    with use_backend(TRITON):
        got = gate_norm_backward(*arguments)
    expected = gate_norm_backward_reference(*arguments)
    factor = amplification(arguments[0])
    for name in PARTS:
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.device.type == DEVICE
            bound = 5 * tolerance(torch.float32 if ours.dtype == torch.float32 else dtype)
            # of the largest: single entries are small differences of large terms
            assert (ours - theirs).abs().max() <= bound * factor * theirs.abs().max().clamp_min(1), name


def amplification(total):
    """What roundings are multiplied with: 1 / standard deviation, about 1; 1000 for rows of one entry."""
    variance = total.float().var(dim=-1, unbiased=False)
    return float((variance + norm.EPSILON).rsqrt().max().clamp_min(1))
