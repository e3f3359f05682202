import numpy as np
import pytest
import torch
from components import scheduler
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from diffusers_qwenimage.schedule import even_sigmas, resolution_shift, set_timesteps


@pytest.mark.parametrize("tokens, mu", [(1024, 0.53871), (4096, 0.69355), (6889, 0.83432)])
def test_shift_of_published_sizes(tokens, mu):
    config = scheduler().config
    assert resolution_shift(tokens, config) == pytest.approx(mu, abs=1e-5)
    assert resolution_shift(tokens, config) == calculate_shift(tokens, 256, 8192, 0.5, 0.9)


def test_defaults_of_a_config_without_shifts_are_those_of_diffusers():
    assert resolution_shift(1000, {}) == calculate_shift(1000)


@pytest.mark.parametrize("steps", [2, 7, 50])
def test_timesteps_equal_diffusers(steps):
    ours, stock = scheduler(), scheduler()
    timesteps = set_timesteps(ours, even_sigmas(steps), num_tokens=4096)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=resolution_shift(4096, stock.config))
    assert torch.equal(timesteps, stock.timesteps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert ours.begin_index == 0


@pytest.mark.parametrize("strength, kept", [(1.0, 10), (0.6, 6), (0.55, 6), (0.01, 1)])
def test_strength_keeps_the_last_part(strength, kept):
    whole = set_timesteps(scheduler(), even_sigmas(10), num_tokens=256)
    part = set_timesteps(scheduler(), even_sigmas(10), num_tokens=256, strength=strength)
    assert torch.equal(part, whole[-kept:])


def test_a_single_step_goes_from_its_sigma_to_zero():
    with pytest.warns(RuntimeWarning, match="divide"):  # the stock scheduler alone: zero by zero
        stock = scheduler()
        stock.set_timesteps(sigmas=[1.0], mu=0.5)
    assert torch.isnan(stock.timesteps).any()

    ours = scheduler()
    assert set_timesteps(ours, even_sigmas(1), num_tokens=256).tolist() == [1000.0]
    noise, velocity = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    assert torch.equal(ours.step(velocity, ours.timesteps[0], noise).prev_sample, noise - velocity)


def test_a_single_step_below_one_is_shifted_by_resolution():
    ours = scheduler()
    timestep = set_timesteps(ours, even_sigmas(1, first=0.5), num_tokens=4096).item()
    shift = np.exp(resolution_shift(4096, ours.config))
    assert timestep == pytest.approx(1000 * shift / (shift + 1), abs=1e-2)


def test_schedule_without_terminal_shift():
    lightning = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=float(np.log(3)),
        max_image_seq_len=8192,
        max_shift=float(np.log(3)),
        use_dynamic_shifting=True,
        shift_terminal=None,
    )
    timesteps = set_timesteps(lightning, even_sigmas(4), num_tokens=4096)
    assert timesteps.tolist() == pytest.approx([1000, 900, 750, 500], abs=1e-3)


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        even_sigmas(0)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        set_timesteps(scheduler(), even_sigmas(4), num_tokens=256, strength=1.5)
    with pytest.raises(ValueError, match="leaves no step"):
        set_timesteps(scheduler(), even_sigmas(4), num_tokens=256, strength=0.0)
    with pytest.raises(ValueError, match="DDIMScheduler does not take sigmas"):
        set_timesteps(DDIMScheduler(), even_sigmas(4), num_tokens=256)
