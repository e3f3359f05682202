"""One LoRA, in every format and through both doors, gives one picture; on the embedded model."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import write_model
from safetensors.torch import save_file

import diffusers_qwenimage
from diffusers_qwenimage.diffsynth import ModelConfig
from diffusers_qwenimage.diffsynth import QwenImagePipeline as DiffSynthStylePipeline
from diffusers_qwenimage.loading import default_checkpoint
from diffusers_qwenimage.lora.apply import changed_weight
from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.targets import TARGETS

TOLERANCE = 1e-4  # equal weights; only the order of fp32 sums differs
PROMPT = "a red circle"
# The modules that DiffSynth-Studio's training scripts name.
SUFFIXES = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
)


@pytest.fixture(scope="module", params=["embedded", "random"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "random":
        return write_model(tmp_path_factory.mktemp("doors") / "model")
    return default_checkpoint()


@cache
def diffusers_door(folder: Path) -> diffusers_qwenimage.QwenImagePipeline:
    pipe = diffusers_qwenimage.QwenImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def diffsynth_door(folder: Path) -> DiffSynthStylePipeline:
    return DiffSynthStylePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig(folder / name) for name in ("transformer", "text_encoder", "vae")],
        tokenizer_config=ModelConfig(folder / "tokenizer"),
    )


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the model in musubi-tuner's spelling, alpha half the rank."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in diffusers_door(folder).transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(SUFFIXES):
            key = f"lora_unet_{name.replace('.', '_')}"
            out, width = module.weight.shape
            size = float(module.weight.detach().std()) * 0.5  # of the change, beside the weight
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * size
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    save_file(tensors, path)
    return path


def picture(folder: Path) -> np.ndarray:
    """[height, width, 3], fp32, of the diffusers-style door."""
    pipe = diffusers_door(folder)
    result = pipe(
        PROMPT,
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    pixels: np.ndarray = result.images[0]
    return pixels


def other_picture(folder: Path) -> np.ndarray:
    """[height, width, 3], whole numbers, of the DiffSynth-style door."""
    image = diffsynth_door(folder)(
        PROMPT, seed=0, height=64, width=64, num_inference_steps=3, progress_bar_cmd=lambda steps: steps
    )
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def expected(folder: Path, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of both doors with the LoRA in the weights, which are put back afterwards."""
    transformers = (diffusers_door(folder).transformer, diffsynth_door(folder).dit)
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in transformers]
    plain = picture(folder), other_picture(folder)
    with torch.no_grad():
        for model in transformers:
            for update in read_lora(source).updates:
                weight = model.get_submodule(update.module).weight
                weight.copy_(changed_weight(weight, update))
    changed = picture(folder), other_picture(folder)
    for model, state in zip(transformers, before, strict=True):
        model.load_state_dict(state)
    assert np.abs(changed[0] - plain[0]).max() > 10 * TOLERANCE  # else nothing would be compared
    return changed


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_picture(
    target: str, folder: Path, source: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    output = tmp_path / ("out" if target == "peft" else "out.safetensors")
    convert_lora(source, output, target)
    pipe, other = diffusers_door(folder), diffsynth_door(folder)
    pipe.load_lora_weights(output)
    other.load_lora(other.dit, output)
    pictures = picture(folder), other_picture(folder)
    pipe.unload_lora_weights()
    other.clear_lora()
    assert np.abs(pictures[0] - expected[0]).max() < TOLERANCE
    # This door gives 8 bits: a difference of 1e-4 may cross the middle between two whole numbers.
    assert np.abs(pictures[1] - expected[1]).max() <= 1
    assert np.count_nonzero(pictures[1] != expected[1]) <= 0.05 * expected[1].size
