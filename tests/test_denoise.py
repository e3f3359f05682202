import pytest
import torch
from components import random, scheduler, transformers
from diffusers import FirstBlockCacheConfig

from diffusers_qwenimage.denoise import Control, DenoiseInputs, KeepRegion, denoise, guide
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

ROUNDING = 2e-6  # a packed batch adds in another order


def inputs_for(schedule, steps=3, **changes):
    defaults = {
        "latents": random(2, 24, 16),
        "timesteps": set_timesteps(schedule, even_sigmas(steps), num_tokens=24),
        "prompt": [random(5, 16, seed=1), random(8, 16, seed=2)],
        "negative": [random(3, 16, seed=3)] * 2,
        "guidance_scale": 3.0,
        "image_shapes": [(1, 4, 6)],
    }
    return DenoiseInputs(**{**defaults, **changes})


def run(transformer, steps=3, **changes):
    schedule = scheduler()
    return denoise(transformer, schedule, inputs_for(schedule, steps, **changes))


def test_packed_guidance_equals_separate_passes():
    ours, stock = transformers()
    separate, _ = transformers()
    separate.enable_cache(FirstBlockCacheConfig(threshold=-1.0))  # never skips, but forces separate passes
    packed = run(ours)
    assert (packed - run(separate)).abs().max() < ROUNDING
    assert (packed - run(stock)).abs().max() < ROUNDING


def test_packed_guidance_calls_the_model_once_per_step():
    ours, _ = transformers()
    calls = []
    ours.img_in.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    run(ours)
    assert calls == [4, 4, 4]


def test_a_step_cache_decides_for_each_branch():
    ours, _ = transformers()
    ours.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    calls = []
    ours.transformer_blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    run(ours, steps=4)
    assert len(calls) == 2  # computed once for each branch, then always reused


def test_offloaded_modulation_gives_the_same_latents():
    ours, _ = transformers()
    expected = run(ours)
    visited, _ = transformers()
    visited.offload_modulation("cpu")
    assert torch.equal(run(visited), expected)


@pytest.mark.parametrize(("steps", "tables"), [(3, 0), (6, 1)])
def test_fused_path_tabulates_the_modulation_of_many_steps(monkeypatch, steps, tables):
    ours, _ = transformers()
    expected = run(ours, steps=steps)
    made = []
    tabulate = type(ours).tabulate_modulation

    def counted(self, sigmas, **arguments):
        made.append(len(sigmas))
        return tabulate(self, sigmas, **arguments)

    monkeypatch.setattr(type(ours), "tabulate_modulation", counted)
    with use_backend("reference"):
        assert (run(ours, steps=steps) - expected).abs().max() < 10 * ROUNDING
    assert made == [steps] * tables


def test_modulation_is_not_tabulated_where_hooks_move_weights(monkeypatch):
    ours, _ = transformers()
    device = torch.device("cpu")
    ours.enable_group_offload(device, device, offload_type="leaf_level")
    monkeypatch.setattr(type(ours), "tabulate_modulation", None)
    with use_backend("reference"):
        run(ours, steps=6)


def test_negative_none_is_no_guidance():
    ours, _ = transformers()
    one = run(ours, negative=None)
    two = run(ours, guidance_scale=1.0, rescale_guidance=False)
    assert (one - two).abs().max() < 1e-5  # uncond + 1 (cond - uncond) rounds
    assert not torch.equal(one, run(ours))


def test_guide_keeps_the_norm_of_each_token():
    conditional, unconditional = random(2, 5, 8), random(2, 5, 8, seed=1)
    guided = guide(conditional, unconditional, 4.0)
    assert torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1), rtol=1e-5)
    plain = guide(conditional, unconditional, 4.0, rescale=False)
    assert torch.equal(plain, unconditional + 4.0 * (conditional - unconditional))
    assert torch.allclose(
        torch.nn.functional.cosine_similarity(guided, plain, dim=-1), torch.ones(2, 5), atol=1e-5
    )


def test_reference_tokens_condition_but_are_not_returned():
    ours, _ = transformers()
    shapes = [(1, 4, 6), (1, 2, 3)]
    one = run(ours, reference=random(2, 6, 16, seed=5), image_shapes=shapes)
    two = run(ours, reference=random(2, 6, 16, seed=6), image_shapes=shapes)
    assert one.shape == (2, 24, 16)
    assert not torch.allclose(one, two)


def test_kept_region_is_exact_at_the_end():
    ours, _ = transformers()
    clean, noise = random(2, 24, 16, seed=7), random(2, 24, 16, seed=8)
    mask = (random(2, 24, 1, seed=9) > 0).float().expand(-1, -1, 16)
    final = run(ours, keep=KeepRegion(mask=mask, clean=clean, noise=noise))
    assert torch.equal(final[mask == 0], clean[mask == 0])
    assert not torch.allclose(final[mask == 1], clean[mask == 1])


class ConstantControl(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = []

    def forward(self, *, hidden_states, conditioning_scale, controlnet_cond, **_):
        self.scales.append(conditioning_scale)
        return [conditioning_scale * controlnet_cond]


def test_control_acts_at_its_steps_and_is_asked_once_per_step():
    ours, stock = transformers()
    condition = random(2, 24, 48, seed=4)
    models = [ConstantControl(), ConstantControl()]
    with_control = [
        run(model, control=Control(model=control, condition=condition, scales=[0.5, 0.0, 0.0]))
        for model, control in zip((ours, stock), models, strict=True)
    ]
    assert models[0].scales == [0.5, 0.0, 0.0]
    assert (with_control[0] - with_control[1]).abs().max() < 1e-5
    assert not torch.allclose(with_control[0], run(ours))


def test_callback_changes_latents_and_prompt():
    ours, _ = transformers()
    seen = []

    def on_step(index, timestep, latents, prompt):
        seen.append((index, float(timestep)))
        return torch.zeros_like(latents) if index == 2 else latents, prompt

    schedule = scheduler()
    inputs = inputs_for(schedule)
    assert not denoise(ours, schedule, inputs, on_step=on_step).any()
    assert [index for index, _ in seen] == [0, 1, 2]
    assert seen[0][1] == float(inputs.timesteps[0])


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interruption_returns_the_latents_so_far(after):
    ours, _ = transformers()
    states = [random(2, 24, 16)]

    def on_step(index, timestep, latents, prompt):
        states.append(latents)
        return latents, prompt

    schedule = scheduler()
    final = denoise(
        ours, schedule, inputs_for(schedule), on_step=on_step, interrupted=lambda: len(states) > after
    )
    assert torch.equal(final, states[after])
    assert len(states) == after + 1
