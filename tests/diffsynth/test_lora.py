"""`load_lora` and `clear_lora` of the DiffSynth-style door."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_made import MODULES, lora_tensors, write_lora

from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline
from diffusers_qwenimage.lora.apply import changed_weight
from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.read import read_state_dict
from diffusers_qwenimage.lora.targets import TARGETS

SMALL = MODULES[:-1]  # proj_out has another size in this model
WIDTH = 32
TOLERANCE = 1e-4  # equal weights; only the order of fp32 sums differs


@pytest.fixture
def pipe(model_folder: Path) -> QwenImagePipeline:
    names = ("transformer", "text_encoder", "vae")
    return QwenImagePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig(model_folder / name) for name in names],
        tokenizer_config=ModelConfig(model_folder / "tokenizer"),
    )


def tensors(format_name: str, **settings: Any) -> dict[str, torch.Tensor]:
    return lora_tensors(format_name, modules=SMALL, hidden=WIDTH, **settings)


def velocity(pipe: QwenImagePipeline) -> torch.Tensor:
    """What the transformer answers; a picture of this model hides a LoRA in its 8 bits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        answer: torch.Tensor = pipe.dit(
            hidden_states=torch.randn(1, 6, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 16, generator=generator),
            timestep=torch.tensor([0.7]),
            img_shapes=[[(1, 2, 3)]],
        ).sample
    return answer


def bake(pipe: QwenImagePipeline, strength: float = 1.0) -> None:
    with torch.no_grad():
        for update in read_state_dict(tensors("kohya")).updates:
            weight = pipe.dit.get_submodule(update.module).weight
            weight.copy_(changed_weight(weight, update, strength))


@pytest.mark.parametrize("target", TARGETS)
def test_every_format_gives_the_same_picture(target: str, pipe: QwenImagePipeline, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", "kohya", modules=SMALL, hidden=WIDTH)
    output = tmp_path / ("out" if target == "peft" else "out.safetensors")
    convert_lora(source, output, target)
    plain = velocity(pipe)
    pipe.load_lora(pipe.dit, output)
    loaded = velocity(pipe)
    image = pipe("a cat", seed=0, height=32, width=48, num_inference_steps=2, progress_bar_cmd=lambda x: x)
    assert image.size == (48, 32)
    pipe.clear_lora()
    assert torch.equal(velocity(pipe), plain)
    bake(pipe)
    assert (velocity(pipe) - plain).abs().max() > 100 * TOLERANCE
    assert (velocity(pipe) - loaded).abs().max() < TOLERANCE


def test_alpha_and_several_files_add_up(pipe: QwenImagePipeline, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", "diffsynth", modules=SMALL, hidden=WIDTH, alpha=None)
    pipe.load_lora(pipe.dit, ModelConfig(path), alpha=0.25)
    pipe.load_lora(pipe.dit, state_dict=tensors("kohya"), alpha=0.5)
    loaded = velocity(pipe)
    pipe.clear_lora()
    bake(pipe)  # its own scale is 1/2, so the first file is half of its change and the second the other half
    assert (velocity(pipe) - loaded).abs().max() < TOLERANCE


def test_refusals(pipe: QwenImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pass pipe\.dit"):
        pipe.load_lora(pipe.vae, state_dict=tensors("kohya"))
    with pytest.raises(ValueError, match="either lora_config"):
        pipe.load_lora(pipe.dit)
    with pytest.raises(ValueError, match="does not fit"):
        pipe.load_lora(pipe.dit, state_dict=lora_tensors("kohya"))
    with pytest.raises(FileNotFoundError):
        pipe.load_lora(pipe.dit, str(tmp_path / "missing.safetensors"))
    pipe.clear_lora()
