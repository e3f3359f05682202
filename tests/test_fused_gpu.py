"""The fused path on a GPU: exactness at the true width, streams, graphs, offloading."""

import diffusers
import pytest
import torch
from components import random, transformer_inputs, transformers
from fused_cases import relative

from diffusers_qwenimage import QwenImageTransformer2DModel, fused, kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.fixture(autouse=True)
def fused_path():
    with kernels.use_backend("auto"):
        yield


@pytest.fixture
def two_streams(monkeypatch):
    monkeypatch.setattr(fused, "text_beside_image", True)


@pytest.fixture(scope="module")
def wide():
    """Four blocks of the true width, ours and diffusers', over the same weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        ours = QwenImageTransformer2DModel(num_layers=4)
        stock = diffusers.QwenImageTransformer2DModel(num_layers=4)
    stock.load_state_dict(ours.state_dict())
    stock.pos_embed = type(stock.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    return ours.eval().requires_grad_(False), stock.eval().requires_grad_(False)


def inputs_of(model, lengths=(77,), dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    return {
        "hidden_states": normal(len(lengths), 31 * 33, 64),
        "encoder_hidden_states": [normal(length, 3584) for length in lengths],
        "timestep": torch.full((len(lengths),), 0.7, device="cuda", dtype=dtype),
        "img_shapes": [[(1, 31, 33)]] * len(lengths),
    }


@pytest.mark.parametrize("lengths", [(77,), (77, 10), (1, 128, 9)])
def test_bf16_is_no_further_from_fp32_than_diffusers(wide, lengths):
    ours, stock = (model.float() for model in wide)
    with torch.no_grad():
        inputs = inputs_of(ours, lengths)
        exact = []
        for index, text in enumerate(inputs["encoder_hidden_states"]):
            one = {**inputs, "encoder_hidden_states": text[None], "img_shapes": inputs["img_shapes"][:1]}
            one.update(
                {
                    key: inputs[key][index : index + 1].bfloat16().float()
                    for key in ("hidden_states", "timestep")
                }
            )
            one["encoder_hidden_states"] = one["encoder_hidden_states"].bfloat16().float()
            exact.append((stock(**one).sample, one))
        ours, stock = (model.bfloat16() for model in wide)
        theirs = torch.cat(
            [
                stock(**{k: v.bfloat16() if torch.is_tensor(v) else v for k, v in one.items()}).sample
                for _, one in exact
            ]
        )
        got = ours(**inputs_of(ours, lengths, torch.bfloat16)).sample
    truth = torch.cat([result for result, _ in exact])
    assert relative(got, truth) <= 1.1 * relative(theirs, truth)


def test_streams_give_the_same_result_every_time(wide, monkeypatch):
    ours = wide[0].bfloat16()
    inputs = inputs_of(ours, (77, 10), torch.bfloat16)
    with torch.no_grad():
        monkeypatch.setattr(fused, "text_beside_image", False)
        expected = ours(**inputs).sample
        monkeypatch.setattr(fused, "text_beside_image", True)
        for _ in range(20):
            assert torch.equal(ours(**inputs).sample, expected)


@pytest.mark.usefixtures("two_streams")
def test_cuda_graph(wide):
    ours = wide[0].bfloat16()
    inputs = inputs_of(ours, (77, 10), torch.bfloat16)
    with torch.no_grad():
        expected = ours(**inputs).sample
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ours(**inputs).sample
        for _ in range(3):
            got.zero_()
            graph.replay()
            assert torch.equal(got, expected)


def test_fused_path_is_taken():
    assert kernels.backend(torch.device("cuda", 0)).name == "triton"
    ours, _ = transformers()
    ours.to("cuda", torch.bfloat16).requires_grad_(False)
    inputs = transformer_inputs([(1, 4, 6)])
    inputs = {k: v.to("cuda", torch.bfloat16) if torch.is_tensor(v) else v for k, v in inputs.items()}
    with torch.no_grad():
        ours(**inputs)
    assert ours.transformer_blocks[0].attn.is_laid_out


@pytest.mark.parametrize("use_stream", [False, True])
def test_group_offload(use_stream):
    ours, _ = transformers()
    ours.to("cuda", torch.bfloat16).requires_grad_(False)
    inputs = transformer_inputs([(1, 8, 8)], 2)
    inputs = {k: v.to("cuda", torch.bfloat16) if torch.is_tensor(v) else v for k, v in inputs.items()}
    inputs["encoder_hidden_states"] = [random(n, 16, seed=n).to("cuda", torch.bfloat16) for n in (3, 9)]
    with torch.no_grad():
        expected = ours(**inputs).sample
        ours.to("cpu")
        ours.enable_group_offload(
            torch.device("cuda"), torch.device("cpu"), "block_level", num_blocks_per_group=1,
            use_stream=use_stream,
        )  # fmt: skip
        for _ in range(3):
            assert relative(ours(**inputs).sample, expected) < 0.01  # one fused product, or three
