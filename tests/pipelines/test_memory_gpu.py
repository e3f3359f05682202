"""VRAM management on a GPU: the same pictures at every budget, and peaks that were foreseen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_qwenimage import QwenImagePipeline, default_checkpoint
from diffusers_qwenimage.pipelines.memory_report import MemoryReport

pytestmark = pytest.mark.gpu
CALL = {"negative_prompt": " ", "height": 256, "width": 256, "num_inference_steps": 3, "seed": 1}
GIB = 2**30


def draw(pipe: QwenImagePipeline) -> np.ndarray:
    """The final latents: the VAE's convolutions choose their algorithms by the memory that is free."""
    pipe.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipe("a red circle", output_type="latent", **CALL).images
    return latents.float().cpu().numpy()


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """With all weights on the device, the modulation tabulated: so it is wherever weights stream."""
    pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.bfloat16).to("cuda")
    pipe.release_graphs()
    pipe.transformer.offload_modulation("cpu")
    return draw(pipe)


def test_decoded_pictures_are_close(expected: np.ndarray) -> None:
    pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.bfloat16).to("cuda")
    managed = QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.bfloat16)
    managed.enable_vram_management(vram_limit=0)
    images = [np.asarray(each("a red circle", **CALL).images[0], dtype=float) for each in (pipe, managed)]
    assert np.abs(images[0] - images[1]).mean() < 2  # of 255: bf16 in the decoder


def smallest(pipe: QwenImagePipeline) -> MemoryReport:
    report: MemoryReport = pipe.enable_vram_management(vram_limit=0)
    return report


@pytest.mark.parametrize("extra", [0, 4 * 2**20, GIB])
@pytest.mark.parametrize("in_place", [False, True])
def test_pictures_do_not_depend_on_the_budget(extra: int, in_place: bool, expected: np.ndarray) -> None:
    settings = {"dtype": torch.bfloat16}
    plain = QwenImagePipeline.from_pretrained(default_checkpoint(), **settings)
    limit = (smallest(plain).smallest + extra) / GIB
    if in_place:
        pipe = QwenImagePipeline.from_pretrained(
            default_checkpoint(), vram_limit=limit, vram_buffer=0, device="cuda", **settings
        )
    else:
        pipe = plain
        pipe.enable_vram_management(vram_limit=limit, vram_buffer=0)
    assert extra or pipe.memory_report().components[0].streamed > 0
    got = draw(pipe)
    difference = np.abs(got - expected).max()
    if extra < GIB:  # with everything resident the modulation need not be tabulated: one row, or two at once
        assert difference == 0
    assert difference < 0.1 * np.abs(expected).max()
    pipe.clear_prompt_cache()
    assert np.array_equal(draw(pipe), got)


def test_the_peak_is_within_the_budget(expected: np.ndarray) -> None:
    pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.bfloat16)
    report = smallest(pipe)
    draw(pipe)  # workspaces of libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipe.clear_prompt_cache()
    draw(pipe)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= report.smallest + 0.5 * GIB


@pytest.mark.parametrize("weights", ["fp8", "int8", "fp8-storage"])
def test_8_bit_pictures_do_not_depend_on_the_budget(weights: str) -> None:
    settings = {"weights": weights, "device": "cuda"}
    resident = QwenImagePipeline.from_pretrained(default_checkpoint(), vram_limit=20, **settings)
    streamed = QwenImagePipeline.from_pretrained(default_checkpoint(), vram_limit=0, **settings)
    assert streamed.memory_report().components[0].streamed > 0
    assert np.array_equal(draw(resident), draw(streamed))


def test_weights_stay_in_the_file(expected: np.ndarray) -> None:
    pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), dtype=torch.bfloat16)
    pipe.enable_vram_management(vram_limit=0, source="mapped")
    assert np.array_equal(draw(pipe), expected)


def test_everything_comes_back(expected: np.ndarray, tmp_path: Path) -> None:
    pipe = QwenImagePipeline.from_pretrained(
        default_checkpoint(), vram_limit=0, device="cuda", dtype=torch.bfloat16
    )
    pipe.save_pretrained(tmp_path)
    again = QwenImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cuda")
    assert np.array_equal(draw(again), expected)
    pipe.disable_vram_management("cuda")
    assert np.array_equal(draw(pipe), expected)
