"""Options: names, defaults and meaning; files and command line; what is refused before weights are read."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
from training_data import MODEL, TARGETS, arguments, config, options

from diffusers_qwenimage.cli import main
from diffusers_qwenimage.training.config import TrainConfig
from diffusers_qwenimage.training.options import add_options, field_docs, make_config, read_config
from diffusers_qwenimage.training.trainer import train

README_FLAGS = {
    "dataset_base_path", "dataset_metadata_path", "max_pixels", "height", "width", "data_file_keys",
    "dataset_repeat", "model_paths", "model_id_with_origin_paths", "tokenizer_path", "learning_rate",
    "num_epochs", "output_path", "remove_prefix_in_ckpt", "trainable_models", "lora_base_model",
    "lora_target_modules", "lora_rank", "extra_inputs", "use_gradient_checkpointing",
    "use_gradient_checkpointing_offload", "gradient_accumulation_steps", "align_to_opensource_format",
}  # fmt: skip


def parse(*line):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_config(parser.parse_args(line))


def test_every_field_has_a_help_text_and_every_readme_flag_a_field():
    names = set(TrainConfig.__dataclass_fields__)
    assert set(field_docs()) == names
    assert names >= README_FLAGS


def test_defaults_of_the_reference():
    settings = parse("--dataset_base_path", "data", "--trainable_models", "dit")
    assert (settings.max_pixels, settings.dataset_repeat, settings.data_file_keys) == (1048576, 1, "image")
    assert (settings.learning_rate, settings.num_epochs, settings.weight_decay) == (1e-4, 1, 0.01)
    assert (settings.output_path, settings.remove_prefix_in_ckpt) == ("./models", "pipe.dit.")
    assert (settings.lora_rank, settings.gradient_accumulation_steps) == (32, 1)
    assert settings.lora_target_modules == TARGETS


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
def test_file_and_command_line_mix(tmp_path, suffix):
    texts = {
        ".yaml": "dataset_base_path: data\nlora_base_model: dit\nlearning_rate: 1e-3\nmax_steps: 7\n"
        "lora_target_modules: [to_q, to_k]\nmodel_paths: [[a, b], c]\n",
        ".toml": 'dataset_base_path = "data"\nlora_base_model = "dit"\nlearning_rate = 1e-3\nmax_steps = 7\n'
        'lora_target_modules = ["to_q", "to_k"]\nmodel_paths = [["a", "b"], "c"]\n',
    }
    (tmp_path / f"run{suffix}").write_text(texts[suffix], encoding="utf-8")
    settings = parse("--config", str(tmp_path / f"run{suffix}"), "--max_steps", "9", "--no_cache")
    assert (settings.learning_rate, settings.max_steps, settings.cache) == (1e-3, 9, False)
    assert settings.lora_target_modules == "to_q,to_k"
    assert json.loads(settings.model_paths) == [["a", "b"], "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rte": 1}, "did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number"),
        ({"lora_rank": 2.5}, "lora_rank must be a whole number"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"height": 100, "width": 96}, "height must be a multiple of 16"),
        ({"height": 96}, "give both for a fixed size"),
        ({"lora_base_model": "unet"}, "Unknown model 'unet'; there are dit, text_encoder, vae"),
        ({"lora_base_model": "vae"}, "A LoRA can be added to dit"),
        ({"lora_base_model": None}, "Say what to train"),
        ({"adapter": "loha"}, "adapter must be one of lora, dora, lokr"),
        ({"caption_dropout": 1.5}, "caption_dropout must be"),
        ({"extra_inputs": "edit_image"}, "takes no further inputs"),
        ({"loggers": "swanlab"}, "loggers knows tensorboard and wandb"),
        ({"use_gradient_checkpointing": "yes"}, "must be true or false"),
        ({"use_gradient_checkpointing": True, "gradient_checkpointing": "auto"}, "leave one of them out"),
        ({"align_to_opensource_format": True, "lora_format": "kohya"}, "not both"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_target_modules": "q,k,v,o"},
            r"no layer of the dit ends with 'q', 'k', 'v', 'o'.* to_q, to_v",
        ),
        ({"lora_format": "webui"}, "Unknown target 'webui'"),
        ({"adapter": "dora", "align_to_opensource_format": True}, "cannot hold a dora"),
        ({"optimizer": "sgdm"}, "Unknown optimizer 'sgdm'"),
        ({"optimizer": "torch.nn.Linear"}, "is no optimizer"),
        ({"caption_column": "text"}, r"no column 'text'.*its columns are 'image', 'prompt'"),
        ({"data_file_keys": "image,edit_image"}, "no column 'edit_image'"),
        ({"model_paths": "models/a.safetensors", "model_id_with_origin_paths": None}, "must be a JSON list"),
        ({"model_id_with_origin_paths": "Qwen/Qwen-Image"}, "not of the form ORG/NAME:PATTERN"),
        ({"model_id_with_origin_paths": MODEL.split(",")[0]}, "no text_encoder and no vae"),
        ({"dataset_base_path": "nowhere"}, "dataset folder nowhere does not exist"),
        ({"resume_from": "latest"}, "no complete trainer state"),
    ],
)
def test_errors_before_weights_are_read(workplace, changes, message):
    """The weights are garbage behind intact headers, so that reading one would be noticed."""
    shutil.copytree(Path("models").resolve(), "copy")
    Path("models").unlink()
    Path("copy").rename("models")
    for path in Path("models").rglob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    with pytest.raises((ValueError, OSError), match=message):
        train(config(**changes))
    assert not list(Path("out").glob("*.safetensors"))


def test_commands_of_the_readme(workplace, capsys):
    """Steps 2 and 3 of DiffSynth-Studio's README, unchanged but for the dataset and the length of the run."""
    line = [
        *("--dataset_base_path", "data", "--dataset_metadata_path", "data/metadata.csv"),
        *("--max_pixels", "1048576", "--dataset_repeat", "2", "--model_id_with_origin_paths", MODEL),
        *("--learning_rate", "1e-4", "--num_epochs", "2", "--remove_prefix_in_ckpt", "pipe.dit."),
        *("--output_path", "out", "--lora_base_model", "dit", "--lora_target_modules", TARGETS),
        *("--lora_rank", "32", "--align_to_opensource_format", "--use_gradient_checkpointing"),
    ]
    assert main(["train", *line]) == 0
    assert sorted(path.name for path in Path("out").glob("*.safetensors")) == [
        "epoch-0.safetensors",
        "epoch-1.safetensors",
    ]
    folder = "models/Qwen/Qwen-Image"
    paths = [
        [f"{folder}/transformer/diffusion_pytorch_model.safetensors"],
        [f"{folder}/text_encoder/model.safetensors"],
        f"{folder}/vae/diffusion_pytorch_model.safetensors",
    ]
    full = arguments(trainable_models="dit", max_steps=1, output_path="full")
    full[full.index("--model_id_with_origin_paths") : full.index("--model_id_with_origin_paths") + 2] = [
        "--model_paths",
        json.dumps(paths, indent=4),
    ]
    assert main(["train", *full]) == 0
    assert (Path("full") / "epoch-0.safetensors").exists() or (Path("full") / "step-1.safetensors").exists()
    assert main(["train", *arguments(lora_base_model="unet")]) == 2
    assert "Unknown model 'unet'" in capsys.readouterr().err


def test_flags_of_diffsynth_without_effect_are_said(caplog):
    line = ["--find_unused_parameters", "--dataset_num_workers", "4", "--task", "sft"]
    assert parse(*arguments(), *line) == parse(*arguments())
    assert (
        "--dataset_num_workers has no effect: latents and embeddings are read from the cache." in caplog.text
    )
    assert caplog.text.count("has no effect") == 3


def test_help_is_in_sections_and_says_what_switches_off(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: qwenimage train --dataset_base_path FOLDER (--lora_base_model dit" in text
    for section in ("dataset:", "model:", "training:", "what is trained:", "memory:", "saved files:"):
        assert f" {section} --" in text
    assert "--no_cache Switches this off: Encode pictures and captions once before the first step" in text
    assert "do not:" not in text


def test_computes_in_float32_on_a_cpu_and_says_what_it_trains(workplace, capsys):
    assert config(dtype=None).on_device("cuda").dtype == "bfloat16"
    assert config(dtype="bfloat16").on_device("cpu").dtype == "bfloat16"
    line = arguments(max_steps=1)
    place = line.index("--dtype")
    assert main(["train", *line[:place], *line[place + 2 :]]) == 0
    said = capsys.readouterr().err
    assert "Training a lora of rank 4 for the dit of Qwen/Qwen-Image on cpu in float32" in said
    assert "4 pictures, 1 steps of 1." in said
