"""VRAM management of the diffusers-style pipelines, on a simulated device: the CPU."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_made import MODULES, lora_tensors
from model_files import write_model
from torch import nn

from diffusers_qwenimage import QwenImageImg2ImgPipeline, QwenImagePipeline
from diffusers_qwenimage.offload import plan_stream, stream, streamed
from diffusers_qwenimage.pipelines.needs import Demand
from diffusers_qwenimage.pipelines.text_survey import text_encoder_surveys
from diffusers_qwenimage.pipelines.vram import VramManager, _is_placed

GIB = 2**30
CALL = {"negative_prompt": " ", "height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}
LORA = {"modules": MODULES[:-1], "hidden": 32}
BF16 = torch.bfloat16


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), dtype=BF16, num_layers=4)


def load(folder: Path, kind: Any = QwenImagePipeline, **settings: Any) -> Any:
    pipe = kind.from_pretrained(folder, dtype=BF16, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def managed(folder: Path, limit: float = 0, kind: Any = QwenImagePipeline) -> Any:
    pipe = load(folder, kind)
    pipe.enable_vram_management(vram_limit=limit, vram_buffer=0)
    return pipe


def draw(pipe: Any, prompt: Any = "a cat", **changes: Any) -> np.ndarray:
    image: np.ndarray = pipe(prompt, output_type="np", **{**CALL, **changes}).images
    return image


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return draw(load(folder))


@pytest.mark.parametrize("extra", [0, 30_000, 60_000, 10**8])
@pytest.mark.parametrize("in_place", [False, True])
def test_pictures_do_not_depend_on_the_budget(
    extra: int, in_place: bool, folder: Path, expected: np.ndarray
) -> None:
    limit = (managed(folder).memory_report().smallest + extra) / GIB
    pipe = load(folder, vram_limit=limit, vram_buffer=0, device="cpu") if in_place else managed(folder, limit)
    report = pipe.memory_report()
    assert max(report.peaks.values()) <= report.budget
    assert np.array_equal(draw(pipe), expected)
    pipe.clear_prompt_cache()
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("source", ["pinned", "mapped"])
def test_weights_can_stay_where_they_are(source: str, folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder)
    pipe.enable_vram_management(vram_limit=0, source=source)
    assert pipe.memory_report().components[0].source == source
    assert np.array_equal(draw(pipe), expected)
    pipe = load(folder, vram_limit=0, stream_from=source, device="cpu")
    assert pipe.memory_report().components[0].source == source
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("moment", ["at once", "after one picture", "after two"])
def test_weights_are_pinned_in_the_background(moment: str, folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder, vram_limit=0, device="cpu")
    report = pipe.memory_report()
    part = report.components[0]
    assert part.source == "pinned" and part.unpinned == part.streamed > 0
    assert report.pinned < part.streamed and "from the file until they are pinned" in str(report)
    for _ in range(["at once", "after one picture", "after two"].index(moment)):
        assert np.array_equal(draw(pipe), expected)
        pipe.clear_prompt_cache()
    pipe.finish_pinning()
    report = pipe.memory_report()
    assert all(part.unpinned == 0 for part in report.components)
    assert report.pinned == sum(part.streamed for part in report.components)
    assert np.array_equal(draw(pipe), expected)


def change_the_budget(pipe: Any) -> Any:
    pipe.enable_vram_management(vram_limit=(pipe.memory_report().smallest + 40_000) / GIB, vram_buffer=0)
    return pipe


def pin_all(pipe: Any) -> Any:
    pipe.enable_vram_management(vram_limit=0, vram_buffer=0, source="pinned")
    assert all(part.unpinned == 0 for part in pipe.memory_report().components)
    return pipe


def leave_all(pipe: Any) -> Any:
    pipe.enable_vram_management(vram_limit=0, vram_buffer=0, source="mapped")
    assert pipe.memory_report().components[0].source == "mapped"
    return pipe


def disable(pipe: Any) -> Any:
    pipe.disable_vram_management()
    return pipe


def plan_for_a_larger_one(pipe: Any) -> Any:
    before = pipe.memory_report().peaks["denoise"]
    pipe._vram.prepare(Demand(rows=200, columns=200, steps=2))
    assert pipe.memory_report().peaks["denoise"] > before
    return pipe


def save_and_load(pipe: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        return load(Path(folder))


@pytest.mark.parametrize(
    "change", [change_the_budget, pin_all, leave_all, disable, plan_for_a_larger_one, save_and_load]
)
def test_what_happens_while_weights_are_pinned(change: Any, folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder, vram_limit=0, vram_buffer=0, device="cpu")
    assert np.array_equal(draw(pipe), expected)  # in its second step pinning begins
    pipe = change(pipe)
    for _ in range(2):
        assert np.array_equal(draw(pipe), expected)
        pipe.clear_prompt_cache()


def test_batches_lists_of_prompts_and_no_guidance(folder: Path) -> None:
    resident, pipe = load(folder), managed(folder)
    for changes in ({"num_images_per_prompt": 2}, {"negative_prompt": None}, {"height": 64, "width": 64}):
        prompts = ["a cat", "a very long prompt about a dog"]
        assert np.array_equal(draw(pipe, prompts, **changes), draw(resident, prompts, **changes))


def test_image_to_image(folder: Path) -> None:
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    resident, pipe = load(folder, QwenImageImg2ImgPipeline), managed(folder, kind=QwenImageImg2ImgPipeline)
    assert np.array_equal(draw(pipe, image=image), draw(resident, image=image))


@pytest.mark.parametrize("weights", ["fp8", "int8", "fp8-storage"])
def test_8_bit_weights_stream_and_are_quantised_on_their_way(weights: str, folder: Path) -> None:
    streaming = load(folder, weights=weights, vram_limit=0, device="cpu")
    resident = load(folder, weights=weights, device="cpu")
    layer = streaming.transformer.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype.itemsize == 1 and streaming.memory_report().components[0].streamed > 0
    assert resident.memory_report().components[0].streamed == 0
    assert np.array_equal(draw(streaming), draw(resident))


def test_loras_come_and_go_and_are_fused(folder: Path, expected: np.ndarray) -> None:
    resident, pipe = load(folder), managed(folder)
    for each in (resident, pipe):
        each.load_lora_weights(lora_tensors("opensource", **LORA), adapter_name="a")
    assert np.array_equal(draw(pipe), draw(resident)) and not np.array_equal(draw(pipe), expected)
    for each in (resident, pipe):
        each.fuse_lora()
    assert np.array_equal(draw(pipe), draw(resident))
    for each in (resident, pipe):
        each.unfuse_lora()
        each.unload_lora_weights()
    assert np.array_equal(draw(pipe), draw(resident))
    assert streamed(pipe.transformer) is not None


def test_saving_writes_the_weights(folder: Path, expected: np.ndarray, tmp_path: Path) -> None:
    managed(folder).save_pretrained(tmp_path)
    assert np.array_equal(draw(load(tmp_path)), expected)


def test_everything_comes_back(folder: Path, expected: np.ndarray) -> None:
    pipe = managed(folder)
    draw(pipe)
    pipe.disable_vram_management()
    assert streamed(pipe.transformer) is streamed(pipe.text_encoder) is None
    assert np.array_equal(draw(pipe), expected)
    pipe.to(torch.float32)
    with pytest.raises(ValueError, match="nothing to report before enable_vram_management"):
        pipe.memory_report()


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu")),
        lambda pipe: pipe.to("meta"),
        lambda pipe: pipe.to(torch.float16),
    ],
)
def test_other_ways_to_move_weights_are_refused_with_a_reason(
    call: Any, folder: Path, expected: np.ndarray
) -> None:
    pipe = managed(folder)
    with pytest.raises(ValueError, match=r"VRAM management is on\. .*disable_vram_management"):
        call(pipe)
    pipe.to("cpu")  # where it is
    assert np.array_equal(draw(pipe), expected)


def test_a_pipeline_that_is_offloaded_otherwise_is_refused(folder: Path) -> None:
    pipe = load(folder)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="offloaded by diffusers"):
        pipe.enable_vram_management()


def test_a_budget_can_be_changed(folder: Path, expected: np.ndarray) -> None:
    pipe = managed(folder)
    for limit in (1, 0, 2, 0):
        report = pipe.enable_vram_management(vram_limit=limit, vram_buffer=0)
        assert (report.components[0].streamed > 0) == (limit == 0)
        assert np.array_equal(draw(pipe), expected)


def test_a_larger_picture_is_planned_anew_and_a_smaller_one_is_not(folder: Path) -> None:
    pipe = load(folder)
    pipe.default_sample_size = 2  # planned for at first: 16x16 pixels
    first = pipe.enable_vram_management(vram_limit=0)
    assert np.array_equal(draw(pipe), draw(load(folder)))
    second = pipe.memory_report()
    assert second.peaks["denoise"] > first.peaks["denoise"]
    draw(pipe, height=16, width=16, num_inference_steps=1)
    assert pipe.memory_report().peaks == second.peaks


def test_embeddings_leave_where_memory_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all layers stay as they are, the module is to be placed anew."""
    monkeypatch.setattr("diffusers_qwenimage.offload.survey.LARGE_BYTES", 1)
    encoder = load(folder).text_encoder
    surveys = text_encoder_surveys(encoder)
    whole = stream(encoder, device="cpu", surveys=surveys)
    less = plan_stream(encoder, whole.device_bytes - 1, device="cpu", surveys=surveys)
    assert less.blocks == whole.blocks and less.num_slots == whole.num_slots == 0
    assert _is_placed(encoder, whole) and not _is_placed(encoder, less)


def test_small_pictures_can_be_planned_for(folder: Path, expected: np.ndarray) -> None:
    pipe = managed(folder)
    large = pipe.memory_report()
    small = pipe.enable_vram_management(0, vram_buffer=0, demand=Demand(rows=2, columns=3, steps=2))
    assert small.smallest < large.smallest
    assert np.array_equal(draw(pipe), expected)


def test_a_budget_that_cannot_work_is_refused_with_the_smallest_that_can(folder: Path) -> None:
    message = r"the smallest budget that works is \d+\.\d\d GiB"
    with pytest.raises(ValueError, match=message):
        load(folder, vram_limit=0.001, vram_buffer=0, device="cpu")
    pipe = load(folder)
    with pytest.raises(ValueError, match=message):
        pipe.enable_vram_management(vram_limit=0.001, strict=True)
    assert draw(pipe).shape == (1, 32, 48, 3)  # nothing has happened
    with pytest.raises(ValueError, match="vram_limit must be a number of at least 0"):
        pipe.enable_vram_management(vram_limit=-1)


def test_the_vae_decodes_in_tiles_if_it_has_to_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = load(folder)
    pipe.default_sample_size = 64
    report = pipe.enable_vram_management(vram_limit=0)
    assert report.tile == 256
    with caplog.at_level(logging.WARNING):
        draw(pipe, height=512, width=512, num_inference_steps=1)
    assert "The VAE works in tiles of 256x256 pixels" in caplog.text
    assert not pipe.vae.use_tiling


def test_a_failure_in_the_loop_leaves_the_pipeline_usable(folder: Path, expected: np.ndarray) -> None:
    pipe = managed(folder)

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    for module in (pipe.transformer.transformer_blocks[2], pipe.vae.decoder, pipe.text_encoder.model):
        handle = module.register_forward_pre_hook(_raise_out_of_memory)
        pipe.clear_prompt_cache()
        with pytest.raises(torch.OutOfMemoryError):
            draw(pipe)
            pipe.text_encoder.model()  # the language model is called directly
        handle.remove()
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fail)
    assert np.array_equal(draw(pipe), expected)


def _raise_out_of_memory(module: nn.Module, arguments: Any) -> None:
    raise torch.OutOfMemoryError("injected")


def test_components_that_are_replaced_are_placed(folder: Path, expected: np.ndarray) -> None:
    pipe = managed(folder)
    pipe.transformer = load(folder).transformer
    assert np.array_equal(draw(pipe), expected)
    assert streamed(pipe.transformer) is not None


def test_weights_are_mapped_if_host_memory_is_short(
    folder: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffusers_qwenimage.pipelines.vram.HOST_RESERVE", 10**15)
    with caplog.at_level(logging.WARNING):
        pipe = managed(folder)
    assert "host memory are too few to pin" in caplog.text
    assert {part.source for part in pipe.memory_report().components} == {"mapped", ""}
    assert np.array_equal(draw(pipe), expected)


def test_the_report_is_for_reading(folder: Path) -> None:
    text = str(managed(folder).memory_report())
    for part in ("resident", "slots", "streams", "transformer", "text_encoder", "vae", "from pinned memory"):
        assert part in text
    assert "expected peak" in text and "time per step" in text and "estimated" in text


def test_the_report_counts_cuda_itself_and_the_buffer(folder: Path) -> None:
    report = load(folder, vram_limit=2, vram_buffer=0.25, device="cpu").memory_report()
    assert (report.budget, report.buffer, report.context) == (2 * GIB, GIB // 4, 0)
    text = str(replace(report, context=GIB // 2, peaks={"text": GIB, "denoise": 2 * GIB, "decode": 0}))
    assert "budget 2.00 GiB, 0.25 GiB of it kept free" in text
    assert "expected peak  2.50 GiB (CUDA 0.50 GiB, then text 1.00 GiB, denoise 2.00 GiB)" in text


def test_what_from_pretrained_does_not_take_in_place_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not take device_map"):
        load(folder, vram_limit=0, device_map="balanced")
    with pytest.raises(ValueError, match="weights is 'nf4'; choose one of"):
        load(folder, weights="nf4")


def test_a_component_can_be_given(folder: Path, expected: np.ndarray) -> None:
    transformer = load(folder).transformer
    pipe = load(folder, transformer=transformer, vram_limit=0, device="cpu")
    assert pipe.transformer is transformer and streamed(transformer) is not None
    assert np.array_equal(draw(pipe), expected)


def test_the_manager_needs_no_vae_or_text_encoder(folder: Path) -> None:
    pipe = load(folder)
    embeds, mask = pipe.encode_prompt("a cat")
    pipe.text_encoder = None
    pipe.enable_vram_management(vram_limit=0)
    assert isinstance(pipe._vram, VramManager)
    latents = pipe(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        num_inference_steps=1,
        height=32,
        width=32,
        output_type="latent",
    ).images
    assert latents.shape == (1, 4, 64)
