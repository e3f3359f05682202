import pytest
import torch
from fused_cases import DEVICE, random, relative

from diffusers_qwenimage.kernels import cublaslt, matmul

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=[cublaslt.TILE_256x128, cublaslt.TILE_128x128])
def tile(request, monkeypatch):
    for name in ("tile_of_few", "tile_of_many"):
        monkeypatch.setattr(cublaslt, name, request.param)
    return request.param


def layer(num_tokens, inputs, outputs, dtype=torch.bfloat16):
    weight = random(outputs, inputs, dtype=dtype, seed=1) / inputs**0.5
    return random(num_tokens, inputs, dtype=dtype), weight, random(outputs, dtype=dtype, seed=2)


def test_torch_computes_where_no_tile_is_chosen():
    assert cublaslt.multiply(*layer(5, 64, 48)) is None


def test_torch_computes_what_the_library_cannot_take(tile):
    x, weight, bias = layer(5, 64, 48)
    cpu = x.cpu(), weight.cpu(), bias.cpu()
    assert cublaslt.multiply(*cpu) is None
    with torch.no_grad():
        assert torch.equal(matmul.linear_now(*cpu), torch.nn.functional.linear(*cpu))
    odd = layer(5, 60, 44)
    gaps = torch.stack([x, x], dim=-1)[..., 0]
    for arguments in (layer(5, 64, 48, torch.float32), odd, (gaps, weight, bias), (x[:0], weight, bias)):
        assert cublaslt.multiply(*arguments) is None


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="tiles are chosen for compute capability 9.0")
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("sizes", [(128, 3072, 9216), (138, 12288, 3072), (4096, 3072, 3072), (7, 256, 512)])
def test_a_chosen_tile_computes_the_same(sizes, with_gelu, tile):
    x, weight, bias = layer(*sizes)
    wide = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    expected = torch.nn.functional.gelu(wide, approximate="tanh") if with_gelu else wide
    y = cublaslt.multiply(x, weight, bias, with_gelu=with_gelu)
    assert y is not None, "the library has no such tile for this product"
    assert relative(y, expected) < 3e-3  # one rounding to bf16, and the library's tanh
    buffer = torch.zeros(sizes[0] + 2, sizes[2] + 64, dtype=x.dtype, device=DEVICE)
    into = buffer[1:-1, : sizes[2]]
    assert cublaslt.multiply(x, weight, bias, into, with_gelu=with_gelu) is into
    assert torch.equal(into, y) and not buffer[0].any() and not buffer[:, sizes[2] :].any()
    # Rows do not depend on how many there are: prompts alone and packed give the same bits.
    part = cublaslt.multiply(x[:5].contiguous(), weight, bias, with_gelu=with_gelu)
    assert part is None or torch.equal(part, y[:5])
