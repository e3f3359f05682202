"""The size that a checkpoint was made for: the default of a call, and a warning far from it."""

import logging
from pathlib import Path

import diffusers
import pytest
import torch
from components import TRANSFORMER

import diffusers_qwenimage
from diffusers_qwenimage import QwenImagePipeline, QwenImageTransformer2DModel, default_checkpoint
from diffusers_qwenimage.pipelines.sizes import recorded_sample_size, warn_if_far

LOGGER = "diffusers_qwenimage.pipelines.sizes"


@pytest.fixture(scope="module")
def embedded() -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(default_checkpoint())


def test_the_embedded_checkpoint_draws_its_own_size(embedded: QwenImagePipeline) -> None:
    embedded.set_progress_bar_config(disable=True)
    image = embedded("a red circle", num_inference_steps=1).images[0]
    assert image.size == (256, 256)


def test_types_that_differ_between_components_are_brought_together(embedded: QwenImagePipeline) -> None:
    """As diffusers loads them when no dtype is given."""
    assert embedded.text_encoder.dtype == torch.bfloat16 and embedded.transformer.dtype == torch.float32
    latents = embedded(
        "a", negative_prompt="b", height=32, width=32, num_inference_steps=1, output_type="latent"
    ).images
    assert latents.dtype == torch.float32


def test_the_size_survives_saving_by_stock_diffusers(tmp_path: Path) -> None:
    stock = diffusers.QwenImageTransformer2DModel.from_pretrained(default_checkpoint() / "transformer")
    stock.save_pretrained(tmp_path)
    assert recorded_sample_size(QwenImageTransformer2DModel.from_pretrained(tmp_path)) == 32


def test_other_checkpoints_have_the_published_default() -> None:
    transformer = diffusers_qwenimage.QwenImageTransformer2DModel(**TRANSFORMER)
    pipeline = QwenImagePipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    assert pipeline.default_sample_size == 128


@pytest.mark.parametrize(
    ("layers", "recorded", "size", "warned"),
    [
        (2, 32, (256, 256), False),
        (2, 32, (512, 512), False),
        (2, 32, (1024, 1024), True),
        (2, 32, (64, 64), True),
        (2, None, (64, 64), False),
        (60, None, (512, 512), False),
        (60, None, (256, 256), True),
        (60, None, (2048, 2048), False),
        (60, None, (4096, 4096), True),
    ],
)
def test_a_size_far_off_is_warned_of(
    layers: int,
    recorded: int | None,
    size: tuple[int, int],
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(**{**TRANSFORMER, "num_layers": layers})
    if recorded is not None:
        transformer.register_to_config(_sample_size=recorded)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        warn_if_far(transformer, *size, scale_factor=8)
    assert ("are far from" in caplog.text) == warned
