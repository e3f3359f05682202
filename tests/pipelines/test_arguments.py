"""Bad input: a ValueError that says what to do, or a stated conversion."""

import numpy as np
import pytest
import torch
from components import WIDTH, generator, pipelines, random
from PIL import Image

PICTURE = Image.new("RGB", (32, 32), "red")
MASK = Image.new("L", (32, 32), 255)
CALL = {
    "prompt_embeds": random(1, 7, WIDTH),
    "prompt_embeds_mask": torch.ones(1, 7),
    "true_cfg_scale": 1.0,
    "num_inference_steps": 2,
    "height": 32,
    "width": 32,
    "output_type": "np",
}


def run(name="QwenImagePipeline", **changes):
    pipe, _ = pipelines(name)
    return pipe(**{**CALL, "generator": generator(), **changes}).images


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "a"}, "either prompt or prompt_embeds, not both"),
        ({"prompt_embeds": None}, "Give prompt or prompt_embeds"),
        ({"prompt_embeds": None, "prompt": 3}, "must be a text or a list of texts, got int"),
        ({"prompt_embeds": None, "prompt": []}, "got an empty list"),
        ({"prompt_embeds": None, "prompt": "a"}, "no text encoder"),
        ({"prompt_embeds": random(7, WIDTH)}, r"must be \[prompts, tokens, width\]"),
        ({"prompt_embeds_mask": torch.ones(1, 6)}, "must have the shape"),
        ({"negative_prompt": "a", "negative_prompt_embeds": random(1, 7, WIDTH)}, "not both"),
        (
            {
                "negative_prompt_embeds": random(3, 7, WIDTH),
                "negative_prompt_embeds_mask": torch.ones(3, 7),
                "true_cfg_scale": 2.0,
            },
            "3 negative prompts for 1 prompts",
        ),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "a whole number of at least 1, got 2.5"),
        ({"height": 32.5}, "whole numbers of pixels, got 32.5 and 32"),
        ({"num_images_per_prompt": 0}, "at least 1, got 0"),
        ({"max_sequence_length": 1025}, "between 1 and 1024, got 1025"),
        ({"height": 7}, "at least 8, got 7 and 32"),
        ({"height": 0}, "at least 8, got 0"),
        ({"output_type": "jpeg"}, "must be one of pil, np, pt, latent"),
        ({"latents": random(1, 4, 8, 8)}, r"must be packed, \[1, 16, channels\]"),
        ({"latents": random(1, 15, 16)}, r"must be packed, \[1, 16, channels\]"),
        ({"generator": [generator()] * 2}, "2 generators for 1 pictures"),
        ({"generator": generator(), "seed": 1}, "either seed or generator"),
        ({"generator": None, "seed": [1, 2]}, "must be a whole number"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"got \['noise'\]"),
    ],
)
def test_text_to_image_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "Give `image`"),
        ({"image": PICTURE, "strength": 1.5}, "between 0 and 1, got 1.5"),
        ({"image": PICTURE, "strength": 0.0}, "leaves no step"),
        ({"image": np.full((32, 32, 3), np.nan, np.float32)}, "NaN"),
        ({"image": torch.full((3, 32, 32), float("inf"))}, "infinite|NaN"),
        ({"image": "picture.png"}, "Pillow images, numpy arrays or torch tensors"),
        ({"image": [PICTURE] * 3}, "3 pictures as `image` for 1 prompts"),
        ({"image": random(1, 4, 3, 3)}, "must be 8 x 8"),
    ],
)
def test_image_to_image_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        run("QwenImageImg2ImgPipeline", **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_image": None}, "Give `mask_image`"),
        ({"mask_image": [MASK] * 3}, "3 pictures as `mask_image`"),
        ({"image": torch.zeros(3, 32, 32), "padding_mask_crop": 4}, "single Pillow images"),
        ({"padding_mask_crop": 4}, 'needs output_type="pil"'),
    ],
)
def test_inpaint_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        run("QwenImageInpaintPipeline", **{"image": PICTURE, "mask_image": MASK, **changes})


def test_odd_sizes_are_rounded_down_with_a_warning(caplog):
    assert run(height=39, width=33).shape == (1, 32, 32, 3)
    assert "multiples of 8: 33x39 becomes 32x32" in caplog.text


def test_seed_is_a_cpu_generator():
    assert np.array_equal(run(generator=None, seed=3), run(generator=generator(3)))


def test_one_step_gives_a_finite_picture():
    assert np.isfinite(run(num_inference_steps=1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16", "LA", "1"])
def test_pictures_of_every_mode(mode):
    picture = Image.new(mode, (50, 20))
    assert run("QwenImageImg2ImgPipeline", image=picture).shape == (1, 32, 32, 3)


def test_tensor_and_array_pictures_equal_the_pillow_one():
    """Stock's image-to-image accepts them too; its inpainting's mask arithmetic does not for all shapes."""
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    expected = run("QwenImageImg2ImgPipeline", image=Image.fromarray(pixels))
    for image in (
        pixels,
        pixels.astype(np.float32) / 255,
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1,
    ):
        assert np.abs(run("QwenImageImg2ImgPipeline", image=image) - expected).max() < 1e-5


def test_latents_as_picture():
    got = run("QwenImageImg2ImgPipeline", image=random(1, 4, 8, 8), output_type="latent")
    assert got.shape == (1, 16, 16)


def test_mask_of_another_size_is_resized():
    small, large = MASK.resize((16, 16)), MASK.resize((99, 77))
    one = run("QwenImageInpaintPipeline", image=PICTURE, mask_image=small)
    two = run("QwenImageInpaintPipeline", image=PICTURE, mask_image=large)
    assert np.array_equal(one, two)


def test_black_mask_keeps_the_picture():
    """Nothing may change: the result is the picture through the VAE."""
    pipe, _ = pipelines("QwenImageInpaintPipeline")
    arguments = {**CALL, "image": PICTURE, "mask_image": Image.new("L", (32, 32), 0), "output_type": "latent"}
    one = pipe(
        **arguments,
        strength=0.9,
        generator=generator(),
    ).images
    two = pipe(**{**arguments, "num_inference_steps": 5}, strength=0.5, generator=generator()).images
    assert torch.equal(one, two)


def test_inpaint_from_own_latents_keeps_their_noise():
    """Stock fails here: it returns one value where three are unpacked."""
    pipe, stock = pipelines("QwenImageInpaintPipeline")
    arguments = {**CALL, "image": PICTURE, "mask_image": MASK, "output_type": "latent", "strength": 1.0}
    noise = random(1, 16, 16, seed=4)
    got = pipe(**arguments, latents=noise, generator=generator()).images
    text, _ = pipelines("QwenImagePipeline")
    # All white mask at strength 1: the same as text to image from this noise.
    call = {**CALL, "output_type": "latent"}
    assert (got - text(**call, latents=noise).images).abs().max() < 1e-5
    with pytest.raises(ValueError, match="unpack"):
        stock(**arguments, latents=noise, generator=generator())


def test_each_prompt_its_picture():
    """With several pictures per prompt, stock repeats pictures as a block, so prompts and pictures part."""
    pipe, _ = pipelines("QwenImageImg2ImgPipeline")
    pictures = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]
    both = {**CALL, "prompt_embeds": random(2, 7, WIDTH), "prompt_embeds_mask": torch.ones(2, 7)}
    got = pipe(**both, image=pictures, num_images_per_prompt=2, strength=0.5, generator=generator()).images
    reddish = [picture[..., 0].mean() - picture[..., 2].mean() for picture in got]
    one = pipe(**both, image=pictures, strength=0.5, generator=generator()).images
    expected = [picture[..., 0].mean() - picture[..., 2].mean() for picture in one]
    order = np.argsort(expected)
    assert (np.argsort(reddish) // 2).tolist() == [order[0], order[0], order[1], order[1]]


def test_guidance_scale_and_masked_latents_say_that_they_do_nothing(caplog):
    run(guidance_scale=3.0)
    assert "guidance_scale has no effect" in caplog.text
    run("QwenImageInpaintPipeline", image=PICTURE, mask_image=MASK, masked_image_latents=random(1, 4, 8, 8))
    assert "masked_image_latents has no effect" in caplog.text


def test_broken_weights_are_noticed(caplog):
    pipe, _ = pipelines("QwenImagePipeline")
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    pipe(**{**CALL, "output_type": "latent"}, generator=generator())
    assert "NaN or infinite" in caplog.text
