"""What is saved loads elsewhere and means the same; optimizers, schedules, validation pictures, the card."""

import itertools
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_data import config, predict

from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.loading import load_transformer
from diffusers_qwenimage.training.checkpoints import load_state
from diffusers_qwenimage.training.data import inspect_rows
from diffusers_qwenimage.training.logs import CAPTION_HEIGHT
from diffusers_qwenimage.training.metadata import read_rows
from diffusers_qwenimage.training.models import find_models
from diffusers_qwenimage.training.optimizers import MovingAverage, learning_rate_at
from diffusers_qwenimage.training.stopping import StopSignal
from diffusers_qwenimage.training.trainer import Trainer, train

FOLDER = "models/Qwen/Qwen-Image"


def train_and_predict(**changes):
    """The weights' path, and the velocity of the trained transformer as it is in memory."""
    settings = config(max_steps=3, learning_rate=0.05, **changes)
    samples = inspect_rows(read_rows(settings), settings, progress=False)
    trainer = Trainer(
        settings, Accelerator(mixed_precision="no"), find_models(settings), samples, StopSignal()
    )
    path = trainer.run(None)
    return path, predict(trainer.trained.modules["dit"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "transformer_blocks.0.attn.to_q.lora_A.default.weight"),
        ({"remove_prefix_in_ckpt": ""}, "pipe.dit.transformer_blocks.0.attn.to_q.lora_A.default.weight"),
        ({"align_to_opensource_format": True}, "transformer_blocks.0.attn.to_q.lora_down.weight"),
        ({"lora_format": "diffusers"}, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
        ({"lora_format": "kohya"}, "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"),
        ({"lora_format": "comfyui"}, "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight"),
        ({"lora_alpha": 2.0}, "transformer_blocks.0.attn.to_q.lora_A.default.weight"),
        ({"lora_alpha": 3.3}, "transformer_blocks.0.attn.to_q.lora_A.default.weight"),  # is rounded into B
        ({"adapter": "dora"}, "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"),
        ({"adapter": "lokr"}, "diffusion_model.transformer_blocks.0.attn.to_q.lokr_w1"),
    ],
)
def test_lora_loads_in_our_pipeline_and_in_diffusers(workplace, changes, key):
    path, expected = train_and_predict(**changes)
    with safe_open(path, "pt") as opened:
        assert key in opened.keys()
        assert opened.metadata()["training.step"] == "3"
    base = diffusers.QwenImagePipeline.from_pretrained(FOLDER)
    assert (predict(base.transformer) - expected).abs().max() > 1e-3
    ours = QwenImagePipeline.from_pretrained(FOLDER)
    ours.load_lora_weights(str(path))
    # LoKr is applied as its product, in another order of operations.
    torch.testing.assert_close(predict(ours.transformer), expected, rtol=1e-4, atol=1e-5)
    if changes.get("adapter") != "lokr" and "remove_prefix_in_ckpt" not in changes:
        base.load_lora_weights(str(path.parent), weight_name=path.name)
        torch.testing.assert_close(predict(base.transformer), expected, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_loads_as_a_transformer(workplace):
    path, expected = train_and_predict(trainable_models="dit")
    ours = load_transformer(path, dtype=torch.float32)
    torch.testing.assert_close(predict(ours), expected)
    stock = diffusers.QwenImageTransformer2DModel.from_pretrained(FOLDER, subfolder="transformer")
    stock.load_state_dict(load_file(path))
    torch.testing.assert_close(predict(stock), expected, rtol=1e-5, atol=1e-5)


def test_text_encoder_and_vae_are_saved_under_their_names(workplace):
    path = train(config(trainable_models="text_encoder,vae", max_steps=1))
    names = set(load_file(path))
    assert {name.split(".")[1] for name in names} == {"text_encoder", "vae"}


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_other_models_learn_and_are_validated_as_they_are(workplace, name):
    train(
        config(
            trainable_models=name,
            max_steps=4,
            save_steps=1,
            learning_rate=1e-2,
            validation_prompts=("a dot",),
            validation_size=32,
            validation_inference_steps=2,
        )
    )
    saved = [load_file(f"out/step-{step}.safetensors") for step in (1, 2, 4)]
    for before, after in itertools.pairwise(saved):  # a validation lies between
        changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        # what neither a text nor encoding takes part in: pictures in the text encoder, the decoder
        idle = {
            key
            for key in after
            if any(part in key for part in (".visual.", "lm_head", "decoder", "post_quant"))
        }
        assert len(changed) > 0.9 * len(after.keys() - idle)
    pictures = [np.asarray(Image.open(f"out/samples/step-{step}.png")) for step in (0, 4)]
    below_the_text = 2 * CAPTION_HEIGHT
    has_changed = not np.array_equal(*(picture[below_the_text:] for picture in pictures))
    assert has_changed == (name == "text_encoder")  # of the VAE, only the encoder has learned


def test_bf16_computes_with_fp32_masters(workplace):
    train(config(dtype="bfloat16", max_steps=2, output_path="lora"))
    assert {v.dtype for v in load_state(Path("lora/step-2.state")).trained.values()} == {torch.float32}
    assert {v.dtype for v in load_file("lora/step-2.safetensors").values()} == {torch.bfloat16}
    train(config(dtype="bfloat16", trainable_models="dit", max_steps=2, output_path="full"))
    assert {v.dtype for v in load_state(Path("full/step-2.state")).trained.values()} == {torch.float32}
    reference = {"dtype": "bfloat16", "trainable_dtype": "bfloat16", "trainable_models": "dit"}
    train(config(**reference, max_steps=2, output_path="half"))
    assert {v.dtype for v in load_state(Path("half/step-2.state")).trained.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adafactor"},
        {"optimizer": "torch.optim.SGD", "optimizer_args": '{"momentum": 0.9}'},
        {"optimizer": "prodigy", "learning_rate": 1.0},
    ],
)
def test_optimizers_resume(workplace, changes):
    if changes["optimizer"] == "prodigy":
        pytest.importorskip("prodigyopt")
    settings = {"save_steps": 2, "max_steps": 4, **changes}
    train(config(output_path="whole", **settings))
    train(config(output_path="out", **settings))
    (Path("out") / "step-4.state").rename("gone")
    train(config(output_path="out", resume_from="latest", **settings))
    whole, again = (load_state(Path(folder) / "step-4.state") for folder in ("whole", "out"))
    assert all(torch.equal(value, again.trained[name]) for name, value in whole.trained.items())
    assert any(value.abs().max() > 0 for name, value in whole.trained.items() if "lora_B" in name)


def test_learning_rates():
    linear = config(lr_schedule="linear", warmup_steps=4, learning_rate=1.0)
    assert [round(learning_rate_at(linear, s, 14), 3) for s in (0, 3, 4, 9, 14)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    cosine = config(lr_schedule="cosine", learning_rate=1.0)
    assert [round(learning_rate_at(cosine, s, 10), 3) for s in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert learning_rate_at(config(learning_rate=0.5), 10**6, 10) == 0.5


def test_moving_average():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage(0.5, {"a": parameter})
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update({"a": parameter}, step=100)
    assert average.values["a"].tolist() == [0.5] * 3
    with average.in_place_of({"a": parameter}):
        assert parameter.tolist() == [0.5] * 3
    assert parameter.tolist() == [1.0] * 3


def test_validation_pictures_log_and_card(workplace):
    path = train(
        config(
            max_steps=4,
            save_steps=2,
            validation_prompts=["a cat", "a dog"],
            validation_size=32,
            validation_inference_steps=2,
            ema_decay=0.5,
        )
    )
    names = sorted(picture.name for picture in Path("out/samples").iterdir())
    assert names == ["step-0.png", "step-2.png", "step-4.png"]
    with Image.open("out/samples/step-4.png") as picture:
        assert picture.size == (64, 64)
    with Image.open("out/loss.png") as picture:
        assert picture.size == (900, 420)
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert path.name in card and "base_model: Qwen/Qwen-Image" in card and "samples/step-4.png" in card
    assert (Path("out") / "step-4-ema.safetensors").is_file()
    assert len(list(Path("out").glob("step-*.state"))) == 2


def test_tensorboard(workplace):
    pytest.importorskip("tensorboard")
    train(config(max_steps=2, loggers="tensorboard"))
    assert list(Path("out").rglob("events.out.tfevents*"))
