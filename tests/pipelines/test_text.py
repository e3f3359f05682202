"""Prompts through whole pipelines, against diffusers, and its bugs that are not inherited."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from components import generator, random

from diffusers_qwenimage import QwenImagePipeline

SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
TOLERANCE = 1e-5  # fp32; the text is encoded without padding, the guidance in one batch


@pytest.fixture(scope="module")
def both(model_folder):
    return QwenImagePipeline.from_pretrained(model_folder), diffusers.QwenImagePipeline.from_pretrained(
        model_folder
    )


@pytest.mark.parametrize(
    "prompt, negative",
    [
        ("a red circle", None),
        ("a red circle", " "),
        ("", ""),
        (["a red circle", "two big blue stars on a yellow background"], None),
        (["a red circle", "two big blue stars on a yellow background"], ["blue", "a long negative prompt"]),
    ],
)
def test_pictures_from_prompts_equal(both, prompt, negative):
    arguments = {"prompt": prompt, "negative_prompt": negative, **SIZE}
    ours, stock = (pipe(generator=generator(), **arguments).images for pipe in both)
    assert np.abs(ours - stock).max() < TOLERANCE


def test_encode_prompt_gives_what_diffusers_gives(both):
    for copies in (1, 2):
        ours, stock = (pipe.encode_prompt("a red circle", num_images_per_prompt=copies) for pipe in both)
        assert ours[0].shape == stock[0].shape and ours[1] is stock[1] is None
        assert (ours[0] - stock[0]).abs().max() < TOLERANCE


def test_mask_of_several_pictures_of_unequal_prompts(both):
    """Stock repeats the mask along the wrong axis: two prompts get each other's masks."""
    ours, stock = both
    prompts = ["a", "two big blue stars on a yellow background"]
    _, mask = ours.encode_prompt(prompts, num_images_per_prompt=2)
    _, stock_mask = stock.encode_prompt(prompts, num_images_per_prompt=2)
    lengths = mask.sum(dim=1).tolist()
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3]
    assert stock_mask.sum(dim=1).tolist() == [lengths[0], lengths[2]] * 2

    together = ours(prompts, negative_prompt=" ", num_images_per_prompt=2, generator=generator(), **SIZE)
    noise = random(4, 4, 64, seed=3)
    together = ours(prompts, negative_prompt=" ", num_images_per_prompt=2, latents=noise, **SIZE).images
    for index, prompt in enumerate(prompts):
        alone = ours(
            prompt,
            negative_prompt=" ",
            num_images_per_prompt=2,
            latents=noise[2 * index : 2 * index + 2],
            **SIZE,
        ).images
        assert np.abs(together[2 * index : 2 * index + 2] - alone).max() < TOLERANCE


def test_one_negative_prompt_serves_all_prompts(both):
    ours, stock = both
    prompts = ["a red circle", "a blue star"]
    one = ours(prompts, negative_prompt="green", generator=generator(), **SIZE).images
    each = ours(prompts, negative_prompt=["green", "green"], generator=generator(), **SIZE).images
    assert np.array_equal(one, each)


def test_embeddings_and_prompt_give_the_same(both):
    ours, _ = both
    prompts = ["a red circle", "two big blue stars"]
    embeds, mask = ours.encode_prompt(prompts)
    negative, negative_mask = ours.encode_prompt([" ", " "])
    from_text = ours(prompts, negative_prompt=[" ", " "], generator=generator(), **SIZE).images
    from_embeds = ours(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        generator=generator(),
        **SIZE,
    ).images
    assert np.array_equal(from_text, from_embeds)


def test_prompt_over_the_limit_is_cut_with_a_warning(both, caplog):
    ours, stock = both
    long = "a red circle and " * 60
    arguments = {"prompt": long, "max_sequence_length": 32, "generator": generator(), **SIZE}
    got = ours(**arguments).images
    assert "are cut off (max_sequence_length=32)" in caplog.text
    expected = stock(**{**arguments, "generator": generator()}).images
    assert np.abs(got - expected).max() < TOLERANCE


def test_guidance_that_does_not_act_says_so(both, caplog):
    ours, _ = both
    ours("a", generator=generator(), **SIZE)
    assert "guidance is off because there is no negative_prompt" in caplog.text
    ours("a", negative_prompt="b", true_cfg_scale=1.0, generator=generator(), **SIZE)
    assert "negative_prompt has no effect because true_cfg_scale is 1.0" in caplog.text


def test_model_cpu_offload_gives_the_same(model_folder, both):
    expected = both[0]("a red circle", negative_prompt=" ", generator=generator(), **SIZE).images
    offloaded = QwenImagePipeline.from_pretrained(model_folder)
    for component in (offloaded.text_encoder, offloaded.transformer, offloaded.vae):
        from accelerate import cpu_offload_with_hook

        cpu_offload_with_hook(component, "cpu")
    got = offloaded("a red circle", negative_prompt=" ", generator=generator(), **SIZE).images
    assert np.array_equal(got, expected)


def test_an_exception_in_a_callback_leaves_the_pipeline_usable(both):
    ours, _ = both
    expected = ours("a red circle", negative_prompt=" ", generator=generator(), **SIZE).images

    def callback(pipe, index, timestep, tensors):
        raise torch.cuda.OutOfMemoryError("injected")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        ours("a", negative_prompt=" ", callback_on_step_end=callback, **SIZE)
    again = ours("a red circle", negative_prompt=" ", generator=generator(), **SIZE).images
    assert np.array_equal(again, expected)
    assert ours.current_timestep is None


def test_freed_text_encoder_leaves_its_last_prompts(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder)
    arguments = {"prompt": "a red circle", "negative_prompt": " ", **SIZE}
    expected = pipe(generator=generator(), **arguments).images
    pipe.free_text_encoder()
    assert pipe.text_encoder is None
    assert np.array_equal(pipe(generator=generator(), **arguments).images, expected)
    with pytest.raises(ValueError, match="'a blue star' is not among the last 2 prompts"):
        pipe("a blue star", **SIZE)
    pipe.clear_prompt_cache()
    with pytest.raises(ValueError, match="pass prompt_embeds instead"):
        pipe("a red circle", **SIZE)


def test_text_encoder_is_not_freed_under_vram_management(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder)
    pipe.enable_vram_management(device="cpu")
    with pytest.raises(ValueError, match="disable_vram_management"):
        pipe.free_text_encoder()


def test_threads_wait_for_each_other(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder)
    arguments = {"prompt": "a red circle", **SIZE, "num_inference_steps": 4}
    expected = pipe(seed=0, **arguments).images
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda _: pipe(seed=0, **arguments).images, range(4)))
    assert all(np.array_equal(picture, expected) for picture in pictures)
