"""Forecast velocities: what is extrapolated, when, and for each branch of the guidance by itself."""

import pytest
import torch
from components import random, scheduler, transformers
from test_denoise import ConstantControl, inputs_for, run

from diffusers_qwenimage.denoise import Control, denoise, guidance_acts
from diffusers_qwenimage.step_cache import Forecast, ForecastCache


def forecast(**config):
    return Forecast(config=ForecastCache(**config))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_of_its_order_are_exact(order):
    coefficients = [random(2, 3, 4, seed=power).double() for power in range(order + 1)]

    def velocity(sigma):
        return sum(value * sigma**power for power, value in enumerate(coefficients))

    state = forecast(order=order, first_steps=0)
    sigmas = [1.0, 0.93, 0.81, 0.6]
    for index, sigma in enumerate(sigmas[: order + 1]):
        assert state.must_compute(index, 10, sigma)
        state.record(sigma, velocity(sigma))
    assert torch.allclose(state.forecast(0.5), velocity(0.5), rtol=1e-9)


def test_skips_while_the_expected_error_is_small():
    state = forecast(threshold=0.1, order=1, first_steps=0, max_skips=10)
    direction = random(1, 3, 4)

    def velocity(sigma):
        return direction * (1 + sigma**2)

    for index, sigma in enumerate([1.0, 0.95, 0.9]):
        state.record(sigma, velocity(sigma))
        assert index > 1 or state.must_compute(index + 1, 20, sigma - 0.05)
    # a line through the last two is off by (sigma - 0.95)(sigma - 0.9) of 1 + sigma^2
    skipped = []
    for sigma in (0.85, 0.8, 0.75, 0.7, 0.6, 0.5):
        if state.must_compute(5, 20, sigma):
            break
        error = (state.forecast(sigma) - velocity(sigma)).norm() / velocity(sigma).norm()
        assert error < 0.1
        skipped.append(sigma)
    assert skipped[:3] == [0.85, 0.8, 0.75]
    assert len(skipped) < 6


def test_never_more_than_max_skips_in_a_row_and_never_the_last_step():
    state = forecast(threshold=1e9, order=0, first_steps=2, max_skips=2)
    computed = []
    for index in range(10):
        sigma = 1 - index / 10
        if state.must_compute(index, 10, sigma):
            computed.append(index)
            state.record(sigma, random(1, 2, 3, seed=index))
        else:
            state.forecast(sigma)
    assert computed == [0, 1, 4, 7, 9]
    assert (state.computed, state.skipped) == (5, 5)


def test_a_batch_is_as_good_as_its_worst_picture():
    good, bad = torch.ones(1, 2, 3), random(1, 2, 3)
    state = forecast(order=0, first_steps=0)
    state.record(1.0, torch.cat([good, good]))
    state.record(0.9, torch.cat([good, bad]))
    assert state.must_compute(2, 10, 0.8)
    state.forget()
    state.record(0.9, torch.cat([good, good]))
    state.record(0.8, torch.cat([good, good]))
    assert not state.must_compute(2, 10, 0.7)


@pytest.mark.parametrize(
    "config",
    [{"threshold": -1}, {"order": 3}, {"max_skips": 0}, {"first_steps": -1}, {"every": 0}],
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(ValueError, match=str(next(iter(config.values())))):
        ForecastCache(**config)


def calls_of(model):
    """Samples of each call, counted where all tokens enter."""
    calls = []
    model.img_in.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    return calls


def test_threshold_zero_computes_every_step():
    ours, _ = transformers()
    expected = run(ours, steps=6)
    calls = calls_of(ours)
    assert torch.equal(run(ours, steps=6, step_cache=ForecastCache(threshold=0.0)), expected)
    assert calls == [4] * 6


@pytest.mark.parametrize("stock", [False, True])
def test_fixed_schedule_forecasts_both_branches(stock):
    model = transformers()[int(stock)]
    calls = calls_of(model)
    cached = run(model, steps=8, step_cache=ForecastCache(every=3, first_steps=2))
    steps = [0, 1, 3, 6, 7]
    assert calls == ([2, 2] if stock else [4]) * len(steps)
    exact = run(model, steps=8)
    assert not torch.equal(cached, exact)
    assert (cached - exact).norm() < 0.1 * exact.norm()


def test_each_branch_decides(monkeypatch):
    ours, _ = transformers()
    decided = Forecast.must_compute
    branches = []

    def must_compute(self, index, num_steps, sigma):
        if not any(known is self for known in branches):
            branches.append(self)
        late = decided(self, index, num_steps, sigma)
        return late or (self is branches[1] and index % 2 == 0)

    monkeypatch.setattr(Forecast, "must_compute", must_compute)
    calls = calls_of(ours)
    run(ours, steps=8, step_cache=ForecastCache(threshold=1e9, first_steps=2, max_skips=9))
    # 4 samples where both branches run together, 2 where only the second does
    assert calls == [4, 4, 4, 2, 2, 4]


def test_changed_control_computes_again():
    ours, _ = transformers()
    condition = random(2, 24, 48, seed=4)
    scales = [0.5] * 6 + [0.0] * 6
    model = ConstantControl()
    calls = calls_of(ours)
    run(
        ours,
        steps=12,
        control=Control(model=model, condition=condition, scales=scales),
        step_cache=ForecastCache(threshold=1e9, first_steps=2, max_skips=9),
    )
    # three that show an error at the start, three where the control ends, and the last
    assert calls == [4] * 7
    assert model.scales == [0.5] * 3 + [0.0] * 4  # asked only where the transformer runs


def test_changed_prompt_computes_again():
    ours, _ = transformers()
    calls = calls_of(ours)
    schedule = scheduler()
    inputs = inputs_for(schedule, 12, step_cache=ForecastCache(threshold=1e9, first_steps=2, max_skips=9))
    other = [random(4, 16, seed=20), random(6, 16, seed=21)]

    def on_step(index, timestep, latents, prompt):
        return latents, other if index >= 5 else prompt

    denoise(ours, schedule, inputs, on_step=on_step)
    assert calls == [4] * 7  # as above


def test_guidance_interval():
    ours, _ = transformers()
    calls = calls_of(ours)
    run(ours, steps=5, guidance_interval=(0.2, 0.8))
    assert calls == [2, 4, 4, 4, 2]
    everywhere = run(ours, steps=5)
    assert torch.equal(run(ours, steps=5, guidance_interval=(0.0, 1.0)), everywhere)
    assert torch.equal(run(ours, steps=5, guidance_interval=(0.0, 0.0)), run(ours, steps=5, negative=None))


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50])
def test_guidance_intervals_share_out_the_steps(num_steps):
    acts = [guidance_acts(index, num_steps, (0.0, 1.0)) for index in range(num_steps)]
    assert all(acts)
    if num_steps % 10 == 0:
        for tenth in range(11):
            early = sum(guidance_acts(i, num_steps, (0.0, tenth / 10)) for i in range(num_steps))
            late = sum(guidance_acts(i, num_steps, (tenth / 10, 1.0)) for i in range(num_steps))
            assert (early, late) == (num_steps * tenth // 10, num_steps - num_steps * tenth // 10)
