import pytest
import torch
from fused_cases import DEVICE, random, relative

from diffusers_qwenimage.kernels.attention_backward import attend, attend_backward

# On a GPU the libraries are those of the real model: bf16, heads of 128.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 1e-2 if DEVICE == "cuda" else 1e-5  # roundings of bf16; sums in another order


@pytest.mark.parametrize("num_tokens", [1, 40, 131])
@pytest.mark.parametrize("batch", [1, 2])
def test_result_and_gradients_equal_autograd(batch, num_tokens):
    """Tensors as the block gives them: heads inside of tokens, queries and keys apart from values."""
    turned = random(batch, num_tokens, 2, 3, 128, dtype=DTYPE)
    joint = random(batch, num_tokens, 3, 3, 128, dtype=DTYPE, seed=1)
    gradient = random(batch, num_tokens, 3, 128, dtype=DTYPE, seed=2).transpose(1, 2)
    inputs = [part.transpose(1, 2) for part in (turned[:, :, 0], turned[:, :, 1], joint[:, :, 2])]
    with torch.no_grad():
        attended = attend(*inputs)
        found = attend_backward(attended, *inputs, gradient)
    leaves = [part.detach().float().requires_grad_() for part in inputs]
    expected = torch.softmax(leaves[0] @ leaves[1].transpose(2, 3) / 128**0.5, -1) @ leaves[2]
    expected.backward(gradient.float())
    assert relative(attended.out, expected) < TOLERANCE
    for ours, leaf in zip(found, leaves, strict=True):
        # one token attends to itself alone: queries and keys have no gradient
        assert (ours.float() - leaf.grad).norm() < TOLERANCE * max(leaf.grad.norm(), 1)
