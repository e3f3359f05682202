import pytest
import torch
from diffusers.models.normalization import RMSNorm
from fused_cases import DEVICE, DTYPES, TRITON, needs_triton, random, relative, tolerance

from diffusers_qwenimage.kernels import rope, use_backend
from diffusers_qwenimage.rotary import rotate

# tokens, heads, head dimension; rows of the table
CASES = [(1, 1, 2, 1), (7, 3, 16, 7), (6, 5, 48, 3), (9, 24, 128, 9), (4, 11, 100, 2), (3, 2, 256, 1)]


def arguments(case, dtype, *, seed=0):
    tokens, heads, dim, table_rows = case
    qkv = random(tokens, 3, heads, dim, dtype=dtype, seed=seed)
    query_weight, key_weight = (1 + random(dim, dtype=dtype, seed=seed + i) / 4 for i in (1, 2))
    angle = random(table_rows, dim // 2, dtype=torch.float32, seed=seed + 3)
    return qkv, query_weight, key_weight, torch.stack([angle.cos(), angle.sin()], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_stock_modules(case, dtype):
    qkv, query_weight, key_weight, table = arguments(case, dtype)
    got = rope.norm_rotate_reference(qkv, query_weight, key_weight, table)
    whole_table = table.repeat(case[0] // case[3], 1, 1)
    for part, weight in enumerate((query_weight, key_weight)):
        norm = RMSNorm(case[2], eps=1e-6).to(qkv.device, dtype)
        norm.weight.data = weight
        expected = rotate(norm(qkv[None, :, part]), whole_table)[0]
        # Complex products there, real ones here: one may fuse a product and a sum where the other rounds.
        assert relative(got[:, part], expected) <= tolerance(dtype)
    assert torch.equal(got[:, 2], qkv[:, 2])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(case, dtype):
    qkv, query_weight, key_weight, table = arguments(case, dtype)
    expected = rope.norm_rotate_reference(qkv, query_weight, key_weight, table)
    tokens = case[0]
    rows = (torch.randperm(tokens, generator=torch.Generator().manual_seed(0)) + 2).to(torch.int32).to(DEVICE)
    for source in (None, qkv, torch.stack([qkv, qkv], dim=-1)[..., 0]):  # the last with gaps
        joint = random(tokens + 3, 3, *qkv.shape[2:], dtype=dtype, seed=8)
        untouched = joint[[0, 1, tokens + 2]].clone()
        if source is None:
            joint[rows.long()] = qkv
        with torch.no_grad(), use_backend(TRITON):
            rope.norm_rotate_into(joint, rows, query_weight, key_weight, table, source)
        assert relative(joint[rows.long()], expected) <= tolerance(dtype)
        assert torch.equal(joint[rows.long()][:, 2], qkv[:, 2])
        assert torch.equal(joint[[0, 1, tokens + 2]], untouched)
    with torch.no_grad(), use_backend(TRITON):
        got = rope.norm_rotate(qkv, query_weight, key_weight, table)
    assert relative(got, expected) <= tolerance(dtype)


def test_reference_in_place():
    qkv, query_weight, key_weight, table = arguments((4, 3, 16, 2), torch.float32)
    expected = rope.norm_rotate_reference(qkv, query_weight, key_weight, table)
    rows = torch.tensor([3, 0, 2, 1], dtype=torch.int32, device=DEVICE)
    with use_backend("reference"):
        for source in (None, qkv):
            joint = torch.zeros(5, 3, 3, 16, device=DEVICE)
            if source is None:
                joint[rows.long()] = qkv
            rope.norm_rotate_into(joint, rows, query_weight, key_weight, table, source)
            assert torch.equal(joint[rows.long()], expected)
            assert joint[4].eq(0).all()


def test_gradients_equal_the_reference():
    inputs = arguments((6, 5, 48, 3), torch.float32)
    gradients = []
    for function in (rope.norm_rotate, rope.norm_rotate_reference):
        leaves = [t.detach().clone().requires_grad_() for t in inputs[:3]]
        out = function(*leaves, inputs[3])
        gradients.append(torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), leaves))
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-5


def test_operations_are_registered_correctly():
    qkv, query_weight, key_weight, table = arguments((6, 5, 48, 3), torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in (qkv, query_weight, key_weight)]
    torch.library.opcheck(torch.ops.diffusers_qwenimage.norm_rotate, (*leaves, table, 1e-6))
    rows = torch.arange(6, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        torch.ops.diffusers_qwenimage.norm_rotate_into,
        (torch.zeros_like(qkv), rows, query_weight, key_weight, table, qkv, 1e-6),
    )


def test_compiles():
    qkv, query_weight, key_weight, table = arguments((6, 5, 48, 3), torch.float32)
    rows = torch.arange(6, dtype=torch.int32, device=DEVICE)

    def chain(qkv):
        joint = torch.zeros_like(qkv)
        rope.norm_rotate_into(joint, rows, query_weight, key_weight, table, qkv)
        return joint + rope.norm_rotate(qkv, query_weight, key_weight, table)

    with torch.no_grad():
        got = torch.compile(chain, fullgraph=True, backend="aot_eager")(qkv)
        assert relative(got, chain(qkv)) < 1e-6
    torch._dynamo.reset()
