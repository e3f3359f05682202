"""Same weights, same seed, same picture as diffusers 0.42.1."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from components import WIDTH, generator, pipelines, random
from PIL import Image

import diffusers_qwenimage

# fp32, final pictures; the packed batch and the 2-D convolutions of the VAE add in another order.
TOLERANCE = 1e-5
PICTURES = np.random.default_rng(0)
PICTURE = Image.fromarray(PICTURES.integers(0, 255, (40, 32, 3), dtype=np.uint8))
MASK = Image.fromarray(((PICTURES.random((40, 32)) > 0.5) * 255).astype(np.uint8))
TASKS = {
    "text-to-image": ("QwenImagePipeline", {}),
    "image-to-image": ("QwenImageImg2ImgPipeline", {"image": PICTURE, "strength": 0.6}),
    "inpaint": ("QwenImageInpaintPipeline", {"image": PICTURE, "mask_image": MASK, "strength": 0.7}),
}


def prompts(batch, *, guided, unequal):
    """Embeddings as a user passes them."""
    mask, negative_mask = torch.ones(batch, 7, dtype=torch.long), torch.ones(batch, 5, dtype=torch.long)
    if unequal:
        mask[0, 4:], negative_mask[-1, 3:] = 0, 0
    arguments = {"prompt_embeds": random(batch, 7, WIDTH, seed=1), "prompt_embeds_mask": mask}
    arguments["true_cfg_scale"] = 3.0 if guided else 1.0
    if guided:
        arguments["negative_prompt_embeds"] = random(batch, 5, WIDTH, seed=2)
        arguments["negative_prompt_embeds_mask"] = negative_mask
    return arguments


@pytest.mark.parametrize("batch, unequal", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_pictures_equal(task, guided, batch, unequal):
    name, extra = TASKS[task]
    ours, stock = pipelines(name)
    arguments = {
        **prompts(batch, guided=guided, unequal=unequal),
        **extra,
        "num_inference_steps": 4,
        "height": 32,
        "width": 48,
        "output_type": "np",
    }
    expected = stock(generator=generator(), **arguments).images
    got = ours(generator=generator(), **arguments).images
    assert got.shape == expected.shape == (batch, 32, 48, 3)
    assert np.abs(got - expected).max() < TOLERANCE


def test_latents_without_guidance_are_bit_equal():
    ours, stock = pipelines("QwenImagePipeline")
    arguments = {
        **prompts(1, guided=False, unequal=False),
        "num_inference_steps": 4,
        "height": 32,
        "width": 48,
        "output_type": "latent",
    }
    assert torch.equal(
        ours(generator=generator(), **arguments).images, stock(generator=generator(), **arguments).images
    )


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_is_no_further_from_fp32_than_diffusers(task):
    name, extra = TASKS[task]
    ours, stock = pipelines(name)
    arguments = {
        **prompts(1, guided=True, unequal=False),
        **extra,
        "num_inference_steps": 3,
        "height": 32,
        "width": 32,
        "output_type": "np",
    }
    exact = stock(generator=generator(), **arguments).images
    for pipeline in (ours, stock):
        pipeline.to(torch.bfloat16)
    arguments = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }

    def error(pipeline):
        # The noise itself is drawn in bf16: average over seeds.
        pictures = [pipeline(generator=generator(seed), **arguments).images for seed in range(3)]
        return np.mean([np.abs(picture - exact).mean() for picture in pictures])

    assert error(ours) < 1.1 * error(stock)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(output_type):
    ours, stock = pipelines("QwenImagePipeline")
    arguments = {
        **prompts(1, guided=True, unequal=False),
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "output_type": output_type,
    }
    expected = stock(generator=generator(), **arguments)
    got = ours(generator=generator(), **arguments)
    assert type(got) is type(expected)
    assert type(got.images) is type(expected.images)
    if output_type == "pil":
        assert got.images[0].size == (32, 32) and got.images[0].mode == "RGB"
        difference = np.abs(np.array(got.images[0], int) - np.array(expected.images[0], int))
        assert difference.max() <= 1  # a value next to a rounding border
    else:
        assert np.abs(np.asarray(got.images) - np.asarray(expected.images)).max() < TOLERANCE
    tuple_output = ours(generator=generator(), return_dict=False, **arguments)
    assert isinstance(tuple_output, tuple) and len(tuple_output) == 1


def test_several_pictures_per_prompt_and_generators():
    ours, stock = pipelines("QwenImagePipeline")
    arguments = {
        **prompts(1, guided=True, unequal=False),
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "num_images_per_prompt": 2,
        "output_type": "np",
    }
    for seeds in (generator, lambda: [generator(1), generator(2)]):
        expected = stock(generator=seeds(), **arguments).images
        got = ours(generator=seeds(), **arguments).images
        assert got.shape == (2, 32, 32, 3)
        assert np.abs(got - expected).max() < TOLERANCE


def test_own_latents_sigmas_and_lora_scale():
    ours, stock = pipelines("QwenImagePipeline")
    arguments = {
        **prompts(1, guided=True, unequal=False),
        "height": 32,
        "width": 32,
        "latents": random(1, 16, 16, seed=9),
        "sigmas": [1.0, 0.6, 0.3],
        "attention_kwargs": {"scale": 0.5},
        "output_type": "np",
    }
    expected, got = stock(**arguments).images, ours(**arguments).images
    assert np.abs(got - expected).max() < TOLERANCE
    assert ours.num_timesteps == 3


def test_inpaint_of_a_cut_out_equals():
    ours, stock = pipelines("QwenImageInpaintPipeline")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (20, 10, 40, 30))
    arguments = {
        **prompts(1, guided=True, unequal=False),
        "image": PICTURE.resize((64, 48)),
        "mask_image": mask,
        "padding_mask_crop": 4,
        "num_inference_steps": 4,
        "height": 32,
        "width": 32,
    }
    expected = stock(generator=generator(), **arguments).images[0]
    got = ours(generator=generator(), **arguments).images[0]
    assert got.size == expected.size == (64, 48)
    assert np.abs(np.array(got, int) - np.array(expected, int)).max() <= 1


def test_callbacks_see_the_same_steps():
    def record(steps):
        def callback(pipe, index, timestep, tensors):
            steps.append((index, float(timestep), tensors["latents"].clone(), tensors["prompt_embeds"].shape))
            return tensors

        return callback

    ours, stock = pipelines("QwenImagePipeline")
    recorded = []
    for pipeline in (ours, stock):
        steps = []
        pipeline(
            **prompts(2, guided=True, unequal=True),
            num_inference_steps=3,
            height=32,
            width=32,
            generator=generator(),
            callback_on_step_end=record(steps),
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            output_type="latent",
        )
        recorded.append(steps)
    for mine, theirs in zip(*recorded, strict=True):
        assert mine[:2] == theirs[:2] and mine[3] == theirs[3]
        assert (mine[2] - theirs[2]).abs().max() < TOLERANCE


def test_interrupt_ends_the_loop():
    def callback(pipe, index, timestep, tensors):
        if index == 1:
            pipe._interrupt = True
        return tensors

    outputs = [
        pipeline(
            **prompts(1, guided=True, unequal=False),
            num_inference_steps=4,
            height=32,
            width=32,
            generator=generator(),
            callback_on_step_end=callback,
            output_type="np",
        ).images
        for pipeline in pipelines("QwenImagePipeline")
    ]
    assert np.abs(outputs[0] - outputs[1]).max() < TOLERANCE


def test_signatures_are_those_of_diffusers():
    for name, _ in TASKS.values():
        ours = inspect.signature(getattr(diffusers_qwenimage, name).__call__).parameters
        stock = inspect.signature(getattr(diffusers, name).__call__).parameters
        added = ("seed", "cfg_start", "cfg_end")
        assert list(ours) == [*stock, *added]
        assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)
        for parameter in stock.values():
            if parameter.name != "callback_on_step_end_tensor_inputs":  # a list there, a tuple here
                assert ours[parameter.name].default == parameter.default, (name, parameter.name)
