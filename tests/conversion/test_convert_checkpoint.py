"""Checkpoints in every layout: the same tensors, and stock diffusers loads them."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "conversion"))

from convert_checkpoint import convert_checkpoint, into_shards, main  # noqa: E402

from diffusers_qwenimage.checkpoint import read_component, read_weights  # noqa: E402
from diffusers_qwenimage.lora.updates import stored  # noqa: E402

# The published head size, so that the settings can be told from the shapes of a single file.
CONFIG = {
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 48,
    "in_channels": 16,
    "out_channels": 4,
    "axes_dims_rope": (16, 56, 56),
}


@pytest.fixture(scope="module")
def model() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**CONFIG).to(torch.bfloat16)


@pytest.fixture(scope="module")
def folder(model: QwenImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "transformer"
    model.save_pretrained(path)
    return path


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def test_folder_to_single_and_back(model: QwenImageTransformer2DModel, folder: Path, tmp_path: Path) -> None:
    single, again = tmp_path / "single.safetensors", tmp_path / "again"
    result = convert_checkpoint(folder, single, "single")
    assert (result.num_changed, result.error) == (0, 0.0)
    assert_equal(load_file(single), dict(model.state_dict()))
    convert_checkpoint(single, again, "diffusers", max_shard_bytes=500_000)
    assert len(list(again.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    loaded = QwenImageTransformer2DModel.from_pretrained(again, torch_dtype=torch.bfloat16)
    assert_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    assert {
        name: tuple(v) if isinstance(v, list) else v for name, v in loaded.config.items() if name in CONFIG
    } == CONFIG


def test_a_checkpoint_of_full_training_by_diffsynth(
    model: QwenImageTransformer2DModel, tmp_path: Path
) -> None:
    source = tmp_path / "step-100.safetensors"
    save_file(
        {f"pipe.dit.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}, source
    )
    convert_checkpoint(source, tmp_path / "out", "diffusers")
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert_equal(dict(loaded.state_dict()), dict(model.state_dict()))


def test_scaled_fp8_and_back(model: QwenImageTransformer2DModel, folder: Path, tmp_path: Path) -> None:
    fp8, back = tmp_path / "fp8.safetensors", tmp_path / "back.safetensors"
    result = convert_checkpoint(folder, fp8, "comfyui-fp8")
    tensors = load_file(fp8)
    assert result.num_changed == 2 * 14
    # e4m3 has 3 bits after the point: at most 2^-4 relative per number, less on average, a little more below
    # 2^-6
    assert 0.01 < result.error < 2**-4 and result.worst_error < 2**-4
    assert tensors["scaled_fp8"].numel() == 2
    assert tensors["transformer_blocks.0.attn.to_q.weight"].dtype == torch.float8_e4m3fn
    assert tensors["transformer_blocks.0.attn.to_q.scale_weight"].shape == ()
    assert tensors["img_in.weight"].dtype == torch.bfloat16
    assert fp8.stat().st_size < 0.6 * sum(p.numel() * 2 for p in model.parameters())
    convert_checkpoint(fp8, back, "single")
    meant = read_weights(read_component(fp8, "transformer")[1], dtype=torch.bfloat16)
    assert_equal(load_file(back), meant)
    original = model.state_dict()["transformer_blocks.1.img_mlp.net.2.weight"].float()
    restored = load_file(back)["transformer_blocks.1.img_mlp.net.2.weight"].float()
    assert float((restored - original).norm() / original.norm()) < 2**-4


def test_casting(folder: Path, model: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    result = convert_checkpoint(folder, tmp_path / "fp32.safetensors", "single", dtype=torch.float32)
    assert result.num_changed == len(model.state_dict()) and result.error == 0  # bf16 fits fp32
    again = convert_checkpoint(
        tmp_path / "fp32.safetensors", tmp_path / "bf16.safetensors", "single", dtype=torch.bfloat16
    )
    assert again.error == 0
    assert_equal(load_file(tmp_path / "bf16.safetensors"), dict(model.state_dict()))


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)}, lora)
    output = tmp_path / "out.safetensors"
    assert main([str(lora), str(output), "--to", "single"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not output.exists()
    with pytest.raises(ValueError, match="not empty"):
        convert_checkpoint(folder, tmp_path, "diffusers")
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors["img_in.bias"][0] = float("nan")
    save_file(tensors, broken)
    with pytest.raises(ValueError, match="img_in.bias holds NaN"):
        convert_checkpoint(broken, tmp_path / "other", "diffusers")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def test_shards_keep_the_order_and_the_limit() -> None:
    tensors = [stored(str(index), torch.zeros(size)) for index, size in enumerate((1, 5, 2, 2, 9, 1))]
    shards = into_shards(tensors, 24)
    assert [[tensor.key for tensor in shard] for shard in shards] == [["0", "1"], ["2", "3"], ["4"], ["5"]]


def test_a_vae_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    vae.save_pretrained(tmp_path / "vae")
    convert_checkpoint(tmp_path / "vae", tmp_path / "vae.safetensors", "single", component="vae")
    convert_checkpoint(tmp_path / "vae.safetensors", tmp_path / "again", "diffusers", component="vae")
    loaded = AutoencoderKLQwenImage.from_pretrained(tmp_path / "again")
    assert_equal(dict(loaded.state_dict()), dict(vae.state_dict()))
    assert loaded.config["dim_mult"] == [1, 2]
    with pytest.raises(ValueError, match="for the transformer, not for the vae"):
        convert_checkpoint(tmp_path / "vae", tmp_path / "x", "comfyui-fp8", component="vae")


@pytest.mark.parametrize("layout", ["single", "diffusers", "comfyui-fp8"])
def test_an_interrupted_conversion_leaves_nothing(layout: str, folder: Path, tmp_path: Path) -> None:
    def stop(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(folder, tmp_path / "out", layout, progress=stop)
    assert list(tmp_path.iterdir()) == []
