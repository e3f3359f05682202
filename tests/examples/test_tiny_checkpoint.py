"""The embedded checkpoint: complete, small, read by stock diffusers, drawing what plain captions say."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from components import generator

from diffusers_qwenimage import QwenImagePipeline, default_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny"))

import evaluate

CALL = {"height": 256, "width": 256, "negative_prompt": " ", "num_inference_steps": 20, "output_type": "np"}
COLOURS = {"red": (220, 35, 35), "blue": (40, 85, 220), "green": (35, 160, 60)}


@pytest.fixture(scope="module")
def pipe():
    pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_permissions():
    files = [path for path in default_checkpoint().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_index_is_canonical():
    index = json.loads((default_checkpoint() / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline"
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKLQwenImage"]


def test_same_picture_as_stock_diffusers(pipe):
    stock = diffusers.QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    arguments = {**CALL, "prompt": "a red circle above a blue square", "num_inference_steps": 4}
    ours = pipe(generator=generator(), **arguments).images
    theirs = stock(generator=generator(), **arguments).images
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize(
    "prompt, shares",
    [
        ("a red circle", {"red": (0.02, 0.2)}),
        ("three green triangles", {"green": (0.03, 0.4)}),
        ("a small red circle to the left of a big blue square", {"red": (0.005, 0.1), "blue": (0.05, 0.4)}),
    ],
)
def test_what_the_caption_says_is_there(pipe, prompt, shares):
    picture = pipe(prompt, generator=generator(), **CALL).images[0] * 255
    background = picture[:6].reshape(-1, 3).mean(axis=0)
    assert np.abs(background - 255).max() < 12  # white when none is named
    for name, (least, most) in shares.items():
        distance = np.abs(picture - np.array(COLOURS[name])).max(axis=-1)
        assert least < (distance < 40).mean() < most, name


def test_left_is_left(pipe):
    prompt = "a small red circle to the left of a big blue square"
    picture = pipe(prompt, generator=generator(), **CALL).images[0] * 255
    columns = {
        name: np.nonzero(np.abs(picture - np.array(COLOURS[name])).max(axis=-1) < 40)[1].mean()
        for name in ("red", "blue")
    }
    assert columns["red"] < columns["blue"]


def test_held_out_captions_are_drawn_right(pipe):
    requests = evaluate.held_out_requests(8, seed=1)
    captions = [request.caption.text for request in requests]
    pictures = evaluate.draw(pipe, captions, steps=20, cfg=4.0, seed=0, batch=8)
    verdicts = [
        evaluate.judge(picture, request.scene, request.caption)
        for picture, request in zip(pictures, requests, strict=True)
    ]
    wrong = [v.faults for v in verdicts if not v.right]
    assert len(wrong) <= 1, wrong  # 97.5 % of 200 are right
