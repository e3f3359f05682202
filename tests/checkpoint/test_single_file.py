"""`from_single_file` of the package's transformer: files that stock diffusers refuses or loads wrongly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import PUBLISHED_HEADS, tiny_transformer
from safetensors.torch import save_file

from diffusers_qwenimage import QwenImageTransformer2DModel


def assert_loads(source: Any, expected: dict[str, torch.Tensor], **settings: Any) -> None:
    loaded = QwenImageTransformer2DModel.from_single_file(source, dtype=torch.float32, **settings)
    assert isinstance(loaded, QwenImageTransformer2DModel)
    got = loaded.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_prefixes_without_a_config(prefix: str, tmp_path: Path) -> None:
    tensors = tiny_transformer(**PUBLISHED_HEADS).state_dict()
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "x.safetensors")
    assert_loads(str(tmp_path / "x.safetensors"), tensors)


def test_a_state_dict_and_a_config_of_a_folder(tmp_path: Path) -> None:
    model = tiny_transformer(zero_cond_t=True)
    model.save_pretrained(tmp_path / "transformer")
    assert_loads(dict(model.state_dict()), model.state_dict(), config=tmp_path, subfolder="transformer")
    assert_loads(dict(model.state_dict()), model.state_dict(), config=dict(model.config))


def test_one_shard_stands_for_all(tmp_path: Path) -> None:
    model = tiny_transformer(**PUBLISHED_HEADS)
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert_loads(shards[0], model.state_dict())


def test_the_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    """Nothing of the module, such as its RoPE tables, is left on the meta device."""
    model = tiny_transformer(**PUBLISHED_HEADS)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    loaded = QwenImageTransformer2DModel.from_single_file(tmp_path / "x.safetensors", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 6, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "encoder_hidden_states_mask": torch.ones(1, 5),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 3)]],
        "return_dict": False,
    }
    with torch.no_grad():
        # fp32 attention of two implementations differs in the last bits
        assert torch.allclose(loaded(**inputs)[0], model(**inputs)[0], atol=1e-5)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    tensors = tiny_transformer(**PUBLISHED_HEADS).state_dict()
    save_file({**tensors, "surplus": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"do not fit QwenImageTransformer2DModel: 1 unknown \('surplus'\)"):
        QwenImageTransformer2DModel.from_single_file(tmp_path / "x.safetensors")
    torch.save({"state_dict": dict(tensors)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="pickle"):
        QwenImageTransformer2DModel.from_single_file(tmp_path / "x.ckpt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        QwenImageTransformer2DModel.from_single_file(tmp_path / "none.safetensors")
