"""Steps inside of the backward pass equal those after it, and rounding at random keeps what is small."""

import pytest
import torch
from safetensors.torch import load_file
from training_data import config

from diffusers_qwenimage.training import host_states
from diffusers_qwenimage.training import learner as learner_module
from diffusers_qwenimage.training.checkpoints import load_state
from diffusers_qwenimage.training.host_states import HostStates
from diffusers_qwenimage.training.in_backward import round_at_random
from diffusers_qwenimage.training.logs import read_log
from diffusers_qwenimage.training.trainer import train

RUN = {"trainable_models": "dit", "max_steps": 4, "save_steps": 2, "max_grad_norm": 0.0}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_equals_steps_after_the_backward_pass(workplace, optimizer):
    settings = {**RUN, "optimizer": optimizer, "learning_rate": 1e-3, "lr_schedule": "cosine"}
    train(config(output_path="after", **settings))
    train(config(output_path="within", optimizer_in_backward=True, **settings))
    logs = [read_log(workplace / folder / "log.csv") for folder in ("after", "within")]
    for one, two in zip(*logs, strict=True):
        assert (one.loss, one.learning_rate) == (two.loss, two.learning_rate)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-5)  # sums in another order
    first, second = (load_file(workplace / folder / "step-4.safetensors") for folder in ("after", "within"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    "kind", [{"optimizer": "adafactor"}, {"optimizer": "adamw", "optimizer_on_host": True}]
)
def test_resumes_in_bf16_bit_for_bit(workplace, monkeypatch, kind):
    monkeypatch.setattr(host_states, "SMALLEST", 0)
    settings = {
        **RUN,
        "optimizer_in_backward": True,
        **kind,
        "dtype": "bfloat16",
        "trainable_dtype": "bfloat16",
    }
    train(config(output_path="whole", **settings))
    train(config(output_path="out", **settings))
    (workplace / "out" / "step-4.state").rename(workplace / "gone")
    train(config(output_path="out", resume_from="latest", **settings))
    assert (
        read_log(workplace / "out" / "log.csv")[-1].loss == read_log(workplace / "whole" / "log.csv")[-1].loss
    )
    whole, out = (load_file(workplace / folder / "step-4.safetensors") for folder in ("whole", "out"))
    assert all(torch.equal(tensor, out[name]) for name, tensor in whole.items())


def test_states_in_host_memory_change_nothing(workplace, monkeypatch):
    made = []
    monkeypatch.setattr(host_states, "SMALLEST", 1024)
    monkeypatch.setattr(
        learner_module, "HostStates", lambda **given: made.append(HostStates(**given)) or made[-1]
    )
    settings = {**RUN, "learning_rate": 1e-3, "optimizer_in_backward": True}
    train(config(output_path="device", **settings))
    train(config(output_path="host", optimizer_on_host=True, **settings))
    device, host = (load_state(workplace / name / "step-4.state") for name in ("device", "host"))
    assert made[0].num_bytes > 50_000
    assert host.optimizer["state"].keys() == device.optimizer["state"].keys()
    for index, states in device.optimizer["state"].items():
        assert states.keys() == host.optimizer["state"][index].keys()
        assert all(torch.equal(value, host.optimizer["state"][index][name]) for name, value in states.items())
    assert all(torch.equal(value, host.trained[name]) for name, value in device.trained.items())


@pytest.mark.parametrize("orders", ["0123456789", "0123456789 9876543210", "0123456789 9", "01 10 0 1"])
def test_states_come_in_any_order(orders):
    """What a weight finds is what it left, whoever came between."""
    states = HostStates(device=torch.device("cpu"), smallest=0)
    kept = {int(name): {"sum": torch.zeros(5 + int(name)), "step": 0} for name in "0123456789"}
    visits = [int(name) for name in orders.replace(" ", "")] * 3
    for index in visits:
        states.bring(index)
        kept[index]["sum"] += index + 1
        states.take(index, kept[index])
    states.settle()
    for index, entry in kept.items():
        assert torch.equal(entry["sum"], torch.full((5 + index,), float((index + 1) * visits.count(index))))


def test_rounding_at_random_has_the_right_mean():
    torch.manual_seed(0)
    values = torch.tensor([1.0, 1.001, -3.3, 1e-20, 0.0, 65000.0])
    rounded = torch.stack([round_at_random(values).double() for _ in range(20_000)])
    exact = values.double()
    spacing = 2.0 ** (exact.abs().clamp_min(1e-30).log2().floor() - 7)  # of bf16 around a value
    assert ((rounded - exact).abs() < spacing).all()
    # the mean of 20,000 draws is within 5 standard deviations, each at most half the spacing
    assert ((rounded.mean(0) - exact).abs() <= 5 * spacing / 2 / 20_000**0.5).all()
    assert torch.equal(round_at_random(values.bfloat16().float()), values.bfloat16())


def test_a_nan_loss_takes_no_step(workplace, monkeypatch):
    from diffusers_qwenimage.training import learner as module

    settings = {**RUN, "optimizer_in_backward": True, "max_bad_steps": 3, "save_steps": 100}
    loss = module.flow_matching_loss
    monkeypatch.setattr(module, "flow_matching_loss", lambda *a, **k: loss(*a, **k) * float("nan"))
    with pytest.raises(ValueError, match="3 steps in a row were skipped, the last one for the loss nan"):
        train(config(**settings))


def test_refuses_what_needs_all_gradients():
    with pytest.raises(ValueError, match="never has all gradients together"):
        config(trainable_models="dit", optimizer_in_backward=True)
