"""CUDA graphs of the transformer on a GPU: recorded by torch, replayed, given up."""

import pytest
import torch
from components import scheduler
from test_fused_gpu import inputs_of, wide  # noqa: F401

from diffusers_qwenimage import kernels
from diffusers_qwenimage.denoise import DenoiseInputs, denoise
from diffusers_qwenimage.graphs import Graphs, ModelCall, forward, graphs_of
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.fixture(autouse=True)
def fused_path():
    with kernels.use_backend("auto"), torch.no_grad():
        yield


@pytest.fixture
def model(wide):  # noqa: F811
    ours = wide[0].bfloat16()
    yield ours
    graphs_of(ours).release()


def call_of(lengths, seed=0, side=(31, 33)):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    return ModelCall(
        hidden_states=normal(len(lengths), side[0] * side[1], 64),
        text=[normal(length, 3584) for length in lengths],
        timestep=torch.full((len(lengths),), 0.9 - 0.1 * seed, device="cuda", dtype=torch.bfloat16),
        image_shapes=[(1, *side)],
    )


@pytest.mark.parametrize("lengths", [(77,), (77, 10), (10, 10)])
def test_replays_are_bit_equal(model, lengths):
    graphs = Graphs()
    graphs.mode = "on"
    results = []
    for seed in range(5):
        results.append((graphs(model, call_of(lengths, seed)), forward(model, call_of(lengths, seed))))
    assert graphs.number == 1
    for got, expected in results:
        assert torch.equal(got, expected)
    assert not torch.equal(results[3][0], results[4][0])


def test_several_shapes_share_memory_and_stay_right(model):
    graphs = Graphs()
    graphs.mode = "on"
    calls = [call_of((77, 10)), call_of((40,)), call_of((77, 10), side=(16, 16))]
    expected = [forward(model, call) for call in calls]
    for _ in range(4):
        for call, truth in zip(calls, expected, strict=True):
            assert torch.equal(graphs(model, call), truth)
            torch.randn(64, 1024, 1024, device="cuda")  # would overwrite what a graph reads and nobody keeps
    assert graphs.number == 3


def test_tables_that_caches_forget_are_kept(model):
    graphs = Graphs()
    graphs.mode = "on"
    call = call_of((77, 10))
    expected = forward(model, call)
    for _ in range(2):
        graphs(model, call)
    for length in range(1, 40):  # more than the caches hold
        forward(model, call_of((length, 3), side=(4, 4)))
    torch.randn(64, 1024, 1024, device="cuda")
    assert torch.equal(graphs(model, call), expected)


def give_new_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def move_away_and_back(model):
    model.to("cpu")
    model.to("cuda")


@pytest.mark.parametrize("change", [give_new_memory, move_away_and_back])
def test_moved_weights_are_recorded_anew(model, change):
    graphs = Graphs()
    graphs.mode = "on"
    call = call_of((77, 10))
    for _ in range(3):
        graphs(model, call)
    change(model)
    torch.randn(256, 1024, 1024, device="cuda")  # where weights were
    for _ in range(3):
        assert torch.equal(graphs(model, call), forward(model, call))
    assert graphs.number == 1


def test_memory_is_freed(model):
    graphs = Graphs()
    graphs.mode = "on"
    call = call_of((77, 10))
    forward(model, call)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        graphs(model, call)
    assert torch.cuda.memory_reserved() > before
    graphs.release()
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20  # the library's work space for products


def test_recording_without_memory_goes_on_launched(model):
    graphs = Graphs()
    graphs.mode = "on"
    call = call_of((77, 10), side=(64, 64))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = graphs(model, call)
    needed = torch.cuda.max_memory_allocated() - before
    total = torch.cuda.mem_get_info()[1]
    # for one forward, not for another that a graph keeps
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + needed // 2) / total)
    try:
        got = graphs(model, call)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(got, expected)
    assert "a graph needs about" in graphs.given_up  # asked for before it is recorded


def test_graphs_give_way_when_memory_runs_out(model):
    graphs = graphs_of(model)
    graphs.mode = "on"
    small, large = call_of((77, 10), side=(48, 48)), call_of((77, 10), side=(64, 64))
    expected = forward(model, large)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    forward(model, large)
    needed = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    for _ in range(3):
        graphs(model, small)
    assert graphs.number == 1
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - before
    assert held > 0
    total = torch.cuda.mem_get_info()[1]
    # for the larger call, or for it and half of what the graph holds, not for both
    torch.cuda.set_per_process_memory_fraction((before + needed + held // 2) / total)
    try:
        got = graphs(model, large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(got, expected)
    assert graphs.number == 0 and graphs.given_up == "device memory ran out"


class Copying(torch.nn.Module):
    """Copies from the processor's memory, which cannot be recorded."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args) * torch.ones(1).to("cuda", torch.bfloat16)


def test_what_cannot_be_recorded_goes_on_launched(model, monkeypatch):
    graphs = Graphs()
    graphs.mode = "on"
    call = call_of((77, 10))
    expected = forward(model, call)
    monkeypatch.setattr(model, "norm_out", Copying(model.norm_out))
    for _ in range(3):
        assert torch.equal(graphs(model, call), expected)
    assert "recording failed" in graphs.given_up
    graphs.mode = "on"
    monkeypatch.undo()
    for _ in range(3):
        assert torch.equal(graphs(model, call), expected)
    assert graphs.number == 1


def test_denoise_with_graphs_is_bit_equal(model):
    def run(mode):
        graphs_of(model).mode = mode
        call = call_of((77, 10))
        schedule = scheduler()
        inputs = DenoiseInputs(
            latents=call.hidden_states[:1],
            timesteps=set_timesteps(schedule, even_sigmas(6), num_tokens=1023, device="cuda"),
            prompt=call.text[:1],
            negative=call.text[1:],
            guidance_scale=4.0,
            image_shapes=call.image_shapes,
        )
        return denoise(model, schedule, inputs)

    expected = run("off")
    assert torch.equal(run("on"), expected)
    assert graphs_of(model).number == 1
    assert torch.equal(run("auto"), expected)
