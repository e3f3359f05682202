"""Graphs of the transformer: what is recorded and when.

Here a recording runs the forward again on the fixed inputs, as a replay does; see also test_graphs_gpu.py.
"""

import copy
import gc
import logging

import pytest
import torch
from components import random, scheduler, transformers
from peft import LoraConfig
from test_denoise import inputs_for

from diffusers_qwenimage import graphs as module
from diffusers_qwenimage.denoise import denoise
from diffusers_qwenimage.graphs import Graphs, ModelCall, forward, graphs_of, signature_of
from diffusers_qwenimage.kernels import use_backend


class Recorder:
    """Counts recordings and replays."""

    def __init__(self, failure=None):
        self.recordings = self.replays = 0
        self.failure = failure

    def __call__(self, run, device, pool):
        if self.failure is not None:
            raise self.failure
        self.recordings += 1
        result = run()

        def replay():
            self.replays += 1
            result.copy_(run())

        return replay, result


@pytest.fixture(autouse=True)
def fused_path():
    with use_backend("reference"), torch.no_grad():
        yield


def call_of(lengths=(5, 3), seed=0, **changes):
    batch = len(lengths)
    defaults = {
        "hidden_states": random(batch, 24, 16, seed=seed),
        "text": [random(length, 16, seed=seed + 1 + i) for i, length in enumerate(lengths)],
        "timestep": torch.full((batch,), 0.1 + 0.1 * seed),
        "image_shapes": [(1, 4, 6)],
    }
    return ModelCall(**{**defaults, **changes})


def switched_on(recorder=None):
    recorder = recorder or Recorder()
    graphs = Graphs(record=recorder)
    graphs.mode = "on"
    return graphs, recorder


def transformer(**config):
    return transformers(**config)[0].requires_grad_(False)


def test_first_call_runs_and_the_second_is_recorded():
    model = transformer()
    graphs, recorder = switched_on()
    for seed, (recordings, replays) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        call = call_of(seed=seed)
        assert torch.equal(graphs(model, call), forward(model, call))
        assert (recorder.recordings, recorder.replays) == (recordings, replays)


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}, {"use_additional_t_cond": True}])
def test_every_input_is_copied(config):
    model = transformer(**config)
    graphs, recorder = switched_on()
    shapes = [(1, 4, 6), (1, 2, 3)]
    for seed in range(4):
        kind = torch.tensor([seed % 2, 1]) if config.get("use_additional_t_cond") else None
        call = call_of(
            seed=seed,
            hidden_states=random(2, 30, 16, seed=seed),
            image_shapes=shapes,
            kind=kind,
            residuals=[random(2, 30, 48, seed=seed + 7)],
        )
        result = graphs(model, call)
        assert torch.equal(result, forward(model, call))
        if seed:
            assert not torch.equal(result, before)  # noqa: F821
        before = result  # noqa: F841
    assert recorder.replays == 3


def test_modulation_is_an_input():
    model = transformer()
    graphs, recorder = switched_on()
    table = model.tabulate_modulation(torch.tensor([0.9, 0.5, 0.1]), dtype=torch.float32)
    for step in range(3):
        call = call_of(seed=step, modulation=table.at(step))
        assert torch.equal(graphs(model, call), forward(model, call))
    assert recorder.replays == 2


def test_shapes_have_graphs_of_their_own_and_the_oldest_goes():
    model = transformer()
    graphs, recorder = switched_on()
    lengths = [(5, 3), (4, 3), (5,), (6,), (7,)]
    for given in lengths:
        for seed in range(2):
            call = call_of(given, seed=seed)
            assert torch.equal(graphs(model, call), forward(model, call))
    assert graphs.number == module.MAX_GRAPHS
    assert recorder.recordings == len(lengths)
    graphs(model, call_of((7,)))
    assert recorder.recordings == len(lengths)
    graphs(model, call_of((5, 3)))  # was dropped
    assert recorder.recordings == len(lengths) + 1


def test_recorded_caches_outlive_their_eviction():
    model = transformer()
    graphs, _ = switched_on()
    for seed in range(2):
        graphs(model, call_of(seed=seed))
    (recorded,) = graphs._graphs.values()
    table = model.pos_embed([(1, 4, 6)], 5, torch.device("cpu"))
    assert all(any(kept is part for kept in recorded.kept) for part in table)
    from diffusers_qwenimage.fused import layout_of

    layout = layout_of(24, (5, 3), torch.device("cpu"))
    assert any(kept is layout.image_rows for kept in recorded.kept)


def move(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def replace(model):
    model.proj_out = copy.deepcopy(model.proj_out)


def cast(model):
    model.double()


def add_adapter(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="one")
    model.requires_grad_(False)


def choose_backend(model):
    model.set_attention_backend("_native_math")


@pytest.mark.parametrize("change", [move, replace, cast, add_adapter, choose_backend])
def test_a_changed_model_is_recorded_anew(change):
    model = transformer()
    graphs, recorder = switched_on()
    for seed in range(3):
        graphs(model, call_of(seed=seed))
    change(model)
    dtype = next(model.parameters()).dtype
    for seed in range(3):
        call = call_of(seed=seed)
        call = call.with_tensors([tensor.to(dtype) for tensor in call.tensors()])
        assert torch.equal(graphs(model, call), forward(model, call))
    assert recorder.recordings == 2


def test_adapter_settings_are_seen():
    model = transformer()
    add_adapter(model)
    seen = {signature_of(model)}
    model.set_adapters(["one"], [0.5])
    seen.add(signature_of(model))
    model.disable_adapters()
    seen.add(signature_of(model))
    assert len(seen) == 3
    model.enable_adapters()
    model.set_adapters(["one"], [1.0])
    assert signature_of(model) in seen


def test_values_changed_in_place_are_read():
    model = transformer()
    graphs, recorder = switched_on()
    for seed in range(2):
        graphs(model, call_of(seed=seed))
    model.proj_out.weight.mul_(2)
    call = call_of(seed=5)
    assert torch.equal(graphs(model, call), forward(model, call))
    assert recorder.recordings == 1


def hook(model):
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.register_forward_pre_hook(lambda *_: None)


def group_offload(model):
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="leaf_level")


def dropout(model):
    model.train().transformer_blocks[0].attn.to_out[1].p = 0.5


def compiled(model):
    model.transformer_blocks[0].compile(backend="eager")


@pytest.mark.parametrize("change", [hook, pre_hook, group_offload, dropout, compiled])
def test_what_cannot_be_recorded_is_launched(change):
    model = transformer()
    change(model)
    assert signature_of(model) is None
    graphs, recorder = switched_on()
    for seed in range(3):
        graphs(model, call_of(seed=seed))
    assert recorder.recordings == 0


def test_reasons():
    graphs, _ = switched_on()
    assert graphs.why_not(call_of()) is None
    assert "scale" in graphs.why_not(call_of(attention_kwargs={"other": 1}))
    assert graphs.why_not(call_of(attention_kwargs={"scale": 0.5})) is None
    with torch.enable_grad():
        assert "gradients" in graphs.why_not(call_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in graphs.why_not(call_of())
    with use_backend("off"):
        assert "fused path" in graphs.why_not(call_of())
    graphs.mode = "off"
    assert "switched off" in graphs.why_not(call_of())
    assert "device is cpu" in Graphs().why_not(call_of())
    with pytest.raises(ValueError, match="auto, on, off"):
        graphs.mode = "always"


@pytest.mark.parametrize(("share", "recordings"), [(0.99, 1), (0.5, 0)])
def test_auto_records_where_launching_takes_the_time(monkeypatch, share, recordings):
    monkeypatch.setattr(module, "_launching", lambda run, device: (run(), share))
    model, recorder = transformer(), Recorder()
    graphs = Graphs(record=recorder)
    for seed in range(5):
        call = call_of(seed=seed)
        assert torch.equal(graphs(model, call), forward(model, call))
    assert recorder.recordings == recordings
    # another text is as quick: not measured again
    monkeypatch.setattr(module, "_launching", None)
    for seed in range(3):
        graphs(model, call_of((9, 1), seed=seed))
    assert recorder.recordings == 2 * recordings


def test_launching_is_a_share_of_the_time():
    result, share = module._launching(lambda: torch.ones(2), torch.device("cpu"))
    assert torch.equal(result, torch.ones(2)) and 0 < share <= 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (torch.OutOfMemoryError("no memory"), "device memory ran out"),
        (RuntimeError("operation not permitted\nwhen a stream is capturing"), "not permitted"),
    ],
)
def test_failed_recording_gives_graphs_up(caplog, failure, reason):
    model = transformer()
    graphs, recorder = switched_on(Recorder(failure))
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            call = call_of(seed=seed)
            assert torch.equal(graphs(model, call), forward(model, call))
    assert ["given up" in record.message for record in caplog.records] == [True]
    assert reason in graphs.given_up and "\n" not in graphs.given_up
    recorder.failure = None
    graphs.release()
    for seed in range(3):
        graphs(model, call_of(seed=seed))
    assert recorder.recordings == 1


def test_memory_of_graphs_is_given_to_who_needs_it(monkeypatch):
    model = transformer()
    graphs, _ = switched_on()
    monkeypatch.setitem(module._GRAPHS, model, graphs)
    for seed in range(2):
        graphs(model, call_of(seed=seed))
    assert graphs.number == 1

    def decode():
        if graphs.number:
            raise torch.OutOfMemoryError("no memory")
        return "picture"

    assert module.release_when_full(model, decode) == "picture"
    with pytest.raises(torch.OutOfMemoryError):
        module.release_when_full(model, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))


def test_graphs_live_as_long_as_their_model():
    model = transformer()
    assert graphs_of(model) is graphs_of(model)
    number = len(module._GRAPHS)
    del model
    gc.collect()
    assert len(module._GRAPHS) < number


def test_denoise_gives_the_same_latents(monkeypatch):
    model = transformer()
    schedule = scheduler()
    expected = denoise(model, schedule, inputs_for(schedule, 5))
    graphs, recorder = switched_on()
    monkeypatch.setitem(module._GRAPHS, model, graphs)
    schedule = scheduler()
    assert torch.equal(denoise(model, schedule, inputs_for(schedule, 5)), expected)
    assert recorder.replays == 4
