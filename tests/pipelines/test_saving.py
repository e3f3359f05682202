"""What we load, save and register: stock folders load as ours, ours load in stock diffusers."""

import json
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from components import generator

import diffusers_qwenimage
from diffusers_qwenimage import (
    AutoencoderKLQwenImage,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

CALL = {"prompt": "a red circle", "negative_prompt": " ", "height": 32, "width": 32, "num_inference_steps": 2}


def picture(pipe):
    return pipe(**CALL, generator=generator(), output_type="np").images


def index_of(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return {key: value for key, value in index.items() if key != "_name_or_path"}


def test_stock_folder_loads_as_our_classes(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert type(pipe.transformer) is QwenImageTransformer2DModel
    assert type(pipe.vae) is AutoencoderKLQwenImage
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_dtype_for_each_component(model_folder):
    pipe = QwenImagePipeline.from_pretrained(
        model_folder, dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32


def test_saved_folder_is_canonical_and_loads_in_diffusers(model_folder, tmp_path):
    ours = QwenImagePipeline.from_pretrained(model_folder)
    ours.save_pretrained(tmp_path)
    assert index_of(tmp_path) == index_of(model_folder)
    stock = diffusers.QwenImagePipeline.from_pretrained(tmp_path)
    assert type(stock.transformer).__module__.startswith("diffusers.models")
    assert np.abs(picture(stock) - picture(ours)).max() < 1e-5
    assert np.array_equal(picture(QwenImagePipeline.from_pretrained(tmp_path)), picture(ours))


def test_variant_reaches_every_component(model_folder, tmp_path):
    QwenImagePipeline.from_pretrained(model_folder).save_pretrained(tmp_path, variant="fp16")
    for name in ("text_encoder", "transformer", "vae"):
        weights = [path.name for path in (tmp_path / name).glob("*.safetensors")]
        assert weights and all(".fp16." in file for file in weights), (name, weights)
    QwenImagePipeline.from_pretrained(tmp_path, variant="fp16")


def test_entry_stays_canonical_when_a_component_is_replaced(model_folder, tmp_path):
    pipe = QwenImagePipeline.from_pretrained(model_folder)
    pipe.transformer = QwenImageTransformer2DModel.from_pretrained(model_folder, subfolder="transformer")
    pipe.save_pretrained(tmp_path)
    assert index_of(tmp_path)["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]


def test_our_components_in_diffusers_pipeline_and_the_other_way_round(model_folder):
    ours = QwenImagePipeline.from_pretrained(model_folder)
    stock = diffusers.QwenImagePipeline.from_pretrained(model_folder)
    expected = picture(stock)
    mixed = diffusers.QwenImagePipeline.from_pretrained(model_folder, transformer=ours.transformer)
    assert np.abs(picture(mixed) - expected).max() < 1e-5
    mixed = QwenImagePipeline.from_pretrained(model_folder, transformer=stock.transformer)
    assert np.abs(picture(mixed) - expected).max() < 1e-5


def test_from_pipe_shares_components_and_keeps_their_types(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder, dtype=torch.bfloat16)
    other = QwenImageImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert pipe.transformer.dtype == torch.bfloat16  # diffusers would have cast it to fp32
    stock = diffusers.QwenImagePipeline.from_pretrained(model_folder)
    assert QwenImagePipeline.from_pipe(stock).transformer is stock.transformer
    assert QwenImagePipeline.from_pipe(pipe, dtype=torch.float32).transformer.dtype == torch.float32
    with pytest.raises(ValueError, match="does not take nonsense"):
        QwenImagePipeline.from_pipe(pipe, nonsense=1)


REGISTERED = """
import sys, torch, diffusers
import diffusers_qwenimage
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForInpainting
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
folder = sys.argv[1]
assert type(DiffusionPipeline.from_pretrained(folder)).__module__.startswith("diffusers.")
diffusers_qwenimage.register()
diffusers_qwenimage.register()
expected = {
    DiffusionPipeline: "QwenImagePipeline",
    AutoPipelineForText2Image: "QwenImagePipeline",
    AutoPipelineForImage2Image: "QwenImageImg2ImgPipeline",
    AutoPipelineForInpainting: "QwenImageInpaintPipeline",
    diffusers.QwenImagePipeline: "QwenImagePipeline",
}
for loader, name in expected.items():
    pipe = loader.from_pretrained(folder)
    assert type(pipe) is getattr(diffusers_qwenimage, name), (loader, type(pipe))
    assert type(pipe.transformer) is diffusers_qwenimage.QwenImageTransformer2DModel
    assert type(pipe.vae) is diffusers_qwenimage.AutoencoderKLQwenImage
model = AutoModel.from_pretrained(folder, subfolder="transformer")
assert type(model) is diffusers_qwenimage.QwenImageTransformer2DModel
image = AutoPipelineForImage2Image.from_pipe(pipe)
assert type(image) is diffusers_qwenimage.QwenImageImg2ImgPipeline
print("all ours")
"""


def test_register_in_a_new_process(model_folder):
    run = subprocess.run(
        [sys.executable, "-c", REGISTERED, str(model_folder)], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "all ours", run.stderr[-2000:]


def test_nothing_is_registered_by_importing():
    assert diffusers_qwenimage.QwenImagePipeline is not diffusers.QwenImagePipeline
    assert diffusers_qwenimage.QwenImageTransformer2DModel is not diffusers.QwenImageTransformer2DModel


def test_folder_without_tokenizer_files_is_refused(model_folder, tmp_path):
    """transformers gives a tokenizer of one token here, and stock fails far away, in a reshape."""
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    for file in (broken / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ValueError, match="not Qwen's, or its files are missing"):
        QwenImagePipeline.from_pretrained(broken)


def test_damaged_weights_and_wrong_paths_are_named(model_folder, tmp_path):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is truncated"):
        QwenImagePipeline.from_pretrained(broken)
    with pytest.raises(ValueError, match="neither the id of a model"):
        QwenImagePipeline.from_pretrained("/no/such/folder")


def test_single_file_transformer(model_folder, tmp_path):
    file = model_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = QwenImageTransformer2DModel.from_pretrained(model_folder, subfolder="transformer")
    loaded = QwenImageTransformer2DModel.from_single_file(
        file, config=str(model_folder), subfolder="transformer", dtype=torch.float32
    )
    assert loaded.config.num_layers == expected.config.num_layers
    for key, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight)


def test_vae_tiling_through_the_pipeline(model_folder):
    pipe = QwenImagePipeline.from_pretrained(model_folder)
    whole = picture(pipe)
    pipe.vae.enable_tiling(tile_size=2, tile_stride=1)
    tiled = picture(pipe)
    assert tiled.shape == whole.shape and tiled.min() >= 0 and tiled.max() <= 1
