"""VRAM management in the DiffSynth-style API, and the snippets of DiffSynth-Studio's README."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline
from diffusers_qwenimage.offload import streamed
from diffusers_qwenimage.quantize import is_quantized

MODEL = "Qwen/Qwen-Image"
# From DiffSynth-Studio's README for Qwen-Image (Apache-2.0), the import line added, the options as a field.
SNIPPET = """
from diffusers_qwenimage.diffsynth import QwenImagePipeline, ModelConfig
import torch

pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors", {options}),
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model*.safetensors", {options}),
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/diffusion_pytorch_model.safetensors", {options}),
    ],
    tokenizer_config=ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/"),
)
pipe.enable_vram_management()
"""  # noqa: E501
OPTIONS = {
    "offload": 'offload_device="cpu"',
    "fp8": "offload_dtype=torch.float8_e4m3fn",
    "both": 'offload_device="cpu", offload_dtype=torch.float8_e4m3fn',
}
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2, "progress_bar_cmd": lambda steps: steps}
MODELS = ("transformer", "text_encoder", "vae")
FP8 = torch.float8_e4m3fn


def load(folder: Path, device: str = "cpu", **options: Any) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(
        torch_dtype=torch.bfloat16,
        device=device,
        model_configs=[
            ModelConfig(folder / name, **options) for name in ("transformer", "text_encoder", "vae")
        ],
        tokenizer_config=ModelConfig(folder / "tokenizer"),
    )


def draw(pipe: QwenImagePipeline, **changes: Any) -> Image.Image:
    return pipe("a cat", cfg_scale=4, seed=1, **{**SMALL, **changes})


def equal(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def run_snippet(name: str, device: str, folder: Path) -> None:
    """In the current folder, where the model lies under its name then."""
    shutil.copytree(folder, Path("models") / MODEL)
    names: dict[str, Any] = {}
    exec(SNIPPET.replace("{options}", OPTIONS[name]).replace('device="cuda"', f'device="{device}"'), names)
    pipe = names["pipe"]
    assert pipe.device.type == device and draw(pipe).size == (48, 32)
    assert is_quantized(pipe.dit) == is_quantized(pipe.text_encoder) == (name != "offload")
    if name == "offload":
        assert equal(draw(pipe), draw(load(folder, device=device)))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_snippets_of_the_readme_run(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_snippet(name, "cpu", model_folder)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_the_snippets_of_the_readme_run_unchanged(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_snippet(name, "cuda", model_folder)


@pytest.mark.parametrize("extra", [0, 60_000, 90_000, 10**7])
def test_pictures_do_not_depend_on_the_budget(extra: int, model_folder: Path) -> None:
    """Bytes above the smallest budget: the weights of the transformer have 200,000."""
    resident, pipe = load(model_folder), load(model_folder, offload_device="cpu")
    least = pipe.enable_vram_management(vram_limit=0, vram_buffer=0).smallest
    report = pipe.enable_vram_management(vram_limit=(least + extra) / 2**30, vram_buffer=0)
    assert max(report.peaks.values()) <= least + extra
    assert equal(draw(pipe), draw(resident))
    plan = streamed(pipe.dit)
    assert plan is not None and (plan.streamed_bytes > 0) == (extra < 10**7)


def test_by_default_all_that_is_free_is_used(model_folder: Path) -> None:
    pipe = load(model_folder, offload_device="cpu")
    report = pipe.enable_vram_management()
    assert report.budget is not None and report.budget > 2**28
    plan = streamed(pipe.dit)
    assert plan is not None and plan.streamed_bytes == 0 and plan.on_call_bytes == 0
    assert equal(draw(pipe), draw(load(model_folder)))


def test_fp8_is_scaled_and_close(model_folder: Path) -> None:
    pipe = load(model_folder, offload_dtype=FP8)
    layer = pipe.dit.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == FP8 and layer.weight_scale.shape == (layer.out_features, 1)
    assert pipe.text_encoder.model.visual.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.bfloat16
    original = load(model_folder).dit.transformer_blocks[0].attn.to_q.weight.float()
    error = (layer.dequantized(torch.float32) - original).norm() / original.norm()
    assert error < 0.03  # e4m3 with a scale per row: 2.6 % for normal weights


def test_fp8_pictures_do_not_depend_on_the_budget(model_folder: Path) -> None:
    resident, pipe = load(model_folder, offload_dtype=FP8), load(model_folder, offload_dtype=FP8)
    pipe.enable_vram_management(vram_limit=0)
    assert equal(draw(pipe), draw(resident))


def test_persistent_parameters_bound_what_stays_and_are_warned_of(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load(model_folder)
    with caplog.at_level(logging.WARNING):
        pipe.enable_vram_management(num_persistent_param_in_dit=9000)
    assert "num_persistent_param_in_dit will be removed" in caplog.text
    plan = streamed(pipe.dit)
    assert plan is not None and plan.streamed_bytes > 0
    assert equal(draw(pipe), draw(load(model_folder)))


def test_a_limit_below_the_smallest_is_exceeded_with_a_warning(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """README: "this is not a strict limit"."""
    pipe = load(model_folder)
    with caplog.at_level(logging.WARNING):
        report = pipe.enable_vram_management(vram_limit=1e-5, vram_buffer=0)
    assert "the smallest budget that works is" in caplog.text and "exceeded" in caplog.text
    assert report.budget == report.smallest
    with pytest.raises(ValueError, match="the smallest budget that works is"):
        load(model_folder).enable_vram_management(vram_limit=1e-5, strict=True)


def test_other_storage_types_are_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="it can be torch.float8_e4m3fn"):
        load(model_folder, offload_dtype=torch.int8)


def test_a_model_that_waits_elsewhere_says_what_to_do(model_folder: Path) -> None:
    pipe = load(model_folder, offload_device="cpu")
    pipe.device = torch.device("cuda")  # as on a machine with a GPU
    with pytest.raises(ValueError, match=r"Call pipe\.enable_vram_management\(\)"):
        draw(pipe)


def test_a_lora_comes_and_goes_meanwhile(model_folder: Path) -> None:
    from lora_made import MODULES, lora_tensors

    state = lora_tensors("opensource", modules=MODULES[:-1], hidden=32)
    pipe, plain = load(model_folder), load(model_folder)
    pipe.enable_vram_management(vram_limit=0)
    before = draw(pipe)
    for each in (pipe, plain):
        each.load_lora(each.dit, state_dict=state, alpha=0.7)
    assert equal(draw(pipe), draw(plain)) and not equal(draw(pipe), before)
    pipe.clear_lora()
    assert equal(draw(pipe), before)


def test_a_larger_picture_is_planned_anew(model_folder: Path) -> None:
    pipe = load(model_folder)
    pipe.dit.register_to_config(_sample_size=2)  # planned for at first: 16x16 pixels
    small = pipe.enable_vram_management(vram_limit=0)
    assert (small.demand.rows, small.demand.columns) == (1, 1)
    first = draw(pipe)
    large = pipe.memory_report()
    assert large.peaks["denoise"] > small.peaks["denoise"] and large.demand.rows * large.demand.columns >= 6
    assert equal(first, draw(load(model_folder)))
    draw(pipe, height=16, width=16)
    assert pipe.memory_report().peaks == large.peaks  # what suffices stays


def test_a_pipeline_without_some_models_can_be_managed(model_folder: Path) -> None:
    pipe = QwenImagePipeline.from_pretrained(
        device="cpu", model_configs=[ModelConfig(model_folder / "transformer")], tokenizer_config=None
    )
    report = pipe.enable_vram_management(vram_limit=0)
    assert report.components[0].streamed > 0
    pipe.disable_vram_management()
    assert streamed(pipe.dit) is None
