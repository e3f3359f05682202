"""Runs that begin with the LoRA of a file: its change is taken over exactly, what does not fit is refused."""

import pytest
import torch
from safetensors.torch import load_file
from training_data import config, open_trainer, predict

from diffusers_qwenimage.training.trainer import train


def first_run(**changes):
    """The weights' path, and what the transformer predicts."""
    trainer = open_trainer(config(max_steps=3, learning_rate=0.05, output_path="first", **changes))
    return trainer.run(None), predict(trainer.trained.modules["dit"])


def begin(path, **changes):
    trainer = open_trainer(config(lora_checkpoint=str(path), output_path="second", **changes))
    trainer.fill_cache()
    trainer.prepare()
    return trainer


@pytest.mark.parametrize(
    ("changes", "later"),
    [
        ({}, {}),
        ({}, {"lora_rank": 7}),
        ({"align_to_opensource_format": True}, {}),
        ({"lora_format": "diffusers"}, {"align_to_opensource_format": True}),
        ({"lora_format": "kohya"}, {}),
        ({"lora_format": "comfyui"}, {"lora_rank": 5, "lora_alpha": 2.0}),
        ({"lora_format": "peft"}, {}),
        ({"lora_alpha": 3.0}, {"lora_alpha": 1.0}),
        ({"adapter": "dora"}, {"adapter": "dora"}),
        ({"lora_target_modules": "to_q,img_mlp.net.2"}, {}),
    ],
)
def test_a_run_begins_where_another_ended(workplace, changes, later):
    path, expected = first_run(**changes)
    found = predict(begin(path, **later).trained.modules["dit"])
    # A scale multiplies B here and the product of the factors there.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_factors_are_those_of_the_file_bit_for_bit(workplace):
    path, _ = first_run()
    trainer, stored = begin(path), load_file(path)
    named = {name.removeprefix("dit."): value for name, value in trainer.trained.parameters.items()}
    assert named.keys() == stored.keys()
    assert all(torch.equal(named[key], value) for key, value in stored.items())


def test_training_goes_on_from_there(workplace):
    path, _ = first_run()
    settings = {"lora_checkpoint": str(path), "output_path": "second", "max_steps": 4}
    train(config(**settings))
    assert (workplace / "second" / "epoch-0.safetensors").exists()
    # Resumed, the state counts and not the file.
    resumed = train(config(**{**settings, "max_steps": 8}, resume_from="latest"))
    whole = train(config(**{**settings, "output_path": "whole", "max_steps": 8}))
    expected = load_file(whole)
    assert all(torch.equal(value, expected[key]) for key, value in load_file(resumed).items())


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        ({}, {"lora_rank": 3}, "has rank 4 and lora_rank is 3: set lora_rank to 4 or more"),
        ({}, {"lora_target_modules": "to_q"}, "changes modules that get no LoRA: .*add_k_proj"),
        ({}, {"adapter": "dora"}, "is a lora and a dora is trained"),
        ({"adapter": "dora"}, {}, "is a dora and a lora is trained"),
        (
            {"adapter": "lokr"},
            {"adapter": "lokr"},
            "is a lokr and a lokr is trained. A run can begin with a lora",
        ),
    ],
)
def test_what_does_not_fit_is_refused(workplace, first, later, message):
    path, _ = first_run(**first)
    with pytest.raises(ValueError, match=message):
        begin(path, **later)


def test_a_file_that_is_not_there(workplace):
    with pytest.raises(FileNotFoundError, match="lora_checkpoint: there is no file nowhere.safetensors"):
        begin("nowhere.safetensors")


def test_whole_models_begin_with_no_lora():
    with pytest.raises(ValueError, match="lora_checkpoint is for a LoRA"):
        config(trainable_models="dit", lora_checkpoint="some.safetensors")
