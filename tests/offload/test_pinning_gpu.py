"""Weights that are pinned in the background for a GPU, part by part: the same results all the while."""

import time

import pytest
import torch

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module, read_component
from diffusers_qwenimage.offload import (
    Pinner,
    adopt,
    finish_pinning,
    pinned_bytes,
    pinning,
    plan_stream,
    rest,
    stream,
    streamed,
    unpinned_bytes,
    unstream,
)
from diffusers_qwenimage.offload.memory import HostMemory
from diffusers_qwenimage.offload.recording import recording, replaying
from diffusers_qwenimage.offload.state import state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few blocks of a third of the true width."""
    path = tmp_path_factory.mktemp("transformer")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = QwenImageTransformer2DModel(num_layers=6, num_attention_heads=8).to(torch.bfloat16)
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(pinning, "PART_BYTES", 2**20)


def waiting(folder, extra=0):
    config, weights = read_component(folder, "transformer")
    model = empty_module(lambda: QwenImageTransformer2DModel.from_config(config)).to(torch.bfloat16)
    model = model.eval().requires_grad_(False)
    limit = plan_stream(model, None, split=False).smallest_overlapping_bytes + extra
    adopt(model, weights, device="cuda", vram_limit=limit, split=False, pinner=Pinner())
    assert unpinned_bytes(model) > 0
    return model


@torch.no_grad()
def run(model):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(torch.bfloat16)

    return model(
        hidden_states=normal(2, 15 * 17, 64),
        encoder_hidden_states=[normal(77, 3584), normal(10, 3584)],
        timestep=torch.full((2,), 0.7, device=DEVICE, dtype=torch.bfloat16),
        img_shapes=[[(1, 15, 17)]] * 2,
    ).sample


@pytest.fixture(scope="module")
def expected(folder):
    model = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    return run(model.to(DEVICE))


def test_results_are_the_same_all_the_while(folder, expected):
    model = waiting(folder)
    end = time.monotonic() + 60
    while unpinned_bytes(model):
        assert time.monotonic() < end
        assert torch.equal(run(model), expected)
    for _ in range(3):
        assert torch.equal(run(model), expected)
    assert pinned_bytes(model) == streamed(model).pinned_bytes
    units = state_of(model)._units
    assert all(len(unit.slab.parts) > 3 for unit in units)
    assert all(home.is_pinned() for unit in units for home in unit.homes)
    rest(model)
    assert torch.equal(run(model), expected)


def test_every_tensor_can_be_copied_from_where_it_is(folder, expected):
    """Of a copy that reads two registered parts the driver makes an error."""
    model = waiting(folder)
    finish_pinning(model)
    for unit in state_of(model)._units:
        for home in unit.homes:
            assert torch.equal(home.to(DEVICE).cpu(), home)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("end", ["more on the device", "less", "to the device", "to the host", "mapped"])
@pytest.mark.parametrize("when", ["meanwhile", "afterwards"])
def test_other_places_for_them(end, when, folder, expected):
    model = waiting(folder, extra=6 * 10**7)
    for _ in range(2):
        run(model)
    if when == "afterwards":
        finish_pinning(model)
    limit = plan_stream(model, None, split=False).smallest_overlapping_bytes
    if end == "more on the device":
        stream(model, device="cuda", vram_limit=limit + 12 * 10**7, split=False)
    elif end == "less":
        stream(model, device="cuda", vram_limit=limit, split=False, pinner=Pinner())
    elif end == "mapped":
        stream(model, device="cuda", vram_limit=limit, split=False, source="mapped")
    elif end == "to the device":
        unstream(model, device="cuda")
    else:
        unstream(model)
        model.to(DEVICE)
    for _ in range(3):
        assert torch.equal(run(model), expected)


def test_where_parts_cannot_be_registered(folder, expected, monkeypatch):
    model = waiting(folder)
    monkeypatch.setattr(HostMemory, "pin_part", lambda *_: False)
    finish_pinning(model)
    assert unpinned_bytes(model) == 0
    assert all(unit.slab.parts == [(0, unit.layout.num_bytes)] for unit in state_of(model)._units)
    for _ in range(2):
        assert torch.equal(run(model), expected)


def test_recorded_when_all_is_pinned(folder, expected):
    model = waiting(folder)
    finish_pinning(model)
    with torch.no_grad():
        table = model.tabulate_modulation(torch.ones(1, device=DEVICE).bfloat16(), dtype=torch.bfloat16).at(0)
    plain = run_recorded(model, table).clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), recording(model):
        result = run_recorded(model, table)
    for _ in range(2):
        with replaying(model):
            graph.replay()
        assert torch.equal(result, plain)
        assert torch.equal(run(model), expected)


@torch.no_grad()
def run_recorded(model, table):
    ones = torch.ones(1, 15 * 17, 64, device=DEVICE, dtype=torch.bfloat16)
    return model(
        hidden_states=ones,
        encoder_hidden_states=[ones.new_ones(20, 3584)],
        timestep=ones.new_ones(1),
        img_shapes=[[(1, 15, 17)]],
        modulation=table,
    ).sample
