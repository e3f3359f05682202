"""Baking: the same weights as by hand, in every layout of a checkpoint, with little memory."""

import json
from pathlib import Path

import pytest
import torch
from components import transformers
from lora_made import MODULES, factors, lora_tensors, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.lora.bake import BAKE_KEY, bake_loras
from diffusers_qwenimage.lora.read import read_header


@pytest.fixture
def base() -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in transformers()[1].state_dict().items()}


def expected(base: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    result = {key: tensor.clone() for key, tensor in base.items()}
    for module in MODULES:
        up, down = factors(module, 4)
        changed = result[f"{module}.weight"].float() + strength * 0.5 * (up @ down)
        result[f"{module}.weight"] = changed.to(base[f"{module}.weight"].dtype)
    return result


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "pipe.dit."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file(prefix: str, dtype: torch.dtype, base: dict[str, Tensor], tmp_path: Path) -> None:
    base = {key: tensor.to(dtype) for key, tensor in base.items()}
    source = tmp_path / "base.safetensors"
    save_file({f"{prefix}{key}": tensor for key, tensor in base.items()}, source, metadata={"title": "x"})
    lora = write_lora(tmp_path / "lora.safetensors", "kohya")
    done: list[int] = []
    result = bake_loras(source, [(lora, 0.5)], tmp_path / "out.safetensors", progress=done.append)
    assert result.num_changed == len(MODULES) and result.num_tensors == len(base)
    assert sum(done) == sum(tensor.numel() * tensor.element_size() for tensor in base.values())
    wanted, written = expected(base, 0.5), load_file(tmp_path / "out.safetensors")
    assert written.keys() == {f"{prefix}{key}" for key in base}
    for key, tensor in wanted.items():
        got = written[f"{prefix}{key}"]
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got, tensor)
        else:  # the sum in fp32 may fall on either side of a rounding to bf16
            assert (got.float() - tensor.float()).abs().max() <= 2**-8 * tensor.float().abs().max()
            assert (got != tensor).float().mean() < 1e-3
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata["title"] == "x"
    assert json.loads(metadata[BAKE_KEY]) == [{"name": "lora.safetensors", "strength": 0.5}]
    limit = 1e-6 if dtype == torch.float32 else 0.1
    assert 0 <= result.relative_rounding < limit


def test_a_folder_of_shards(tmp_path: Path) -> None:
    transformer = transformers()[0]
    transformer.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    lora = write_lora(tmp_path / "lora.safetensors")
    bake_loras(tmp_path / "base", [(lora, 1.0)], tmp_path / "out")
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out")
    wanted = expected(transformer.state_dict())
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key])
    with pytest.raises(ValueError, match="exists"):
        bake_loras(tmp_path / "base", [(lora, 1.0)], tmp_path / "out")


def test_subtracting_gives_the_base_back(base: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(base, tmp_path / "base.safetensors")
    lora = write_lora(tmp_path / "lora.safetensors")
    bake_loras(tmp_path / "base.safetensors", [(lora, 1.0), (lora, -1.0)], tmp_path / "out.safetensors")
    for key, tensor in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(tensor, base[key])


def test_every_kind(base: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(base, tmp_path / "base.safetensors")
    q, k, v = MODULES[:3]
    tensors = {
        f"diffusion_model.{q}.diff": torch.randn(48, 48),
        f"diffusion_model.{q}.diff_b": torch.randn(48),
        f"diffusion_model.{k}.lokr_w1": torch.randn(4, 4),
        f"diffusion_model.{k}.lokr_w2": torch.randn(12, 12),
        "diffusion_model.transformer_blocks.0.attn.norm_q.diff": torch.randn(16),
    }
    up, down = factors(v, 4)
    tensors |= {f"diffusion_model.{v}.lora_up.weight": up, f"diffusion_model.{v}.lora_down.weight": down}
    tensors[f"diffusion_model.{v}.dora_scale"] = torch.rand(48, 1) + 0.5
    save_file(tensors, tmp_path / "lora.safetensors")
    bake_loras(
        tmp_path / "base.safetensors", [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "out.safetensors"
    )
    written = load_file(tmp_path / "out.safetensors")
    prefix = "diffusion_model."
    directions = base[f"{v}.weight"] + up @ down
    wanted = {
        f"{q}.weight": base[f"{q}.weight"] + tensors[f"{prefix}{q}.diff"],
        f"{q}.bias": base[f"{q}.bias"] + tensors[f"{prefix}{q}.diff_b"],
        f"{k}.weight": base[f"{k}.weight"]
        + torch.kron(tensors[f"{prefix}{k}.lokr_w1"], tensors[f"{prefix}{k}.lokr_w2"]),
        f"{v}.weight": tensors[f"{prefix}{v}.dora_scale"] * directions / directions.norm(dim=1, keepdim=True),
        "transformer_blocks.0.attn.norm_q.weight": base["transformer_blocks.0.attn.norm_q.weight"]
        + tensors[f"{prefix}transformer_blocks.0.attn.norm_q.diff"],
    }
    for key, tensor in written.items():
        torch.testing.assert_close(tensor, wanted.get(key, base[key]))


def test_refusals(base: dict[str, Tensor], tmp_path: Path) -> None:
    source, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(base, source)
    narrow = write_lora(tmp_path / "narrow.safetensors", hidden=32)
    deep = write_lora(tmp_path / "deep.safetensors", modules=("transformer_blocks.7.attn.to_q",))
    with pytest.raises(ValueError, match="a change of shape"):
        bake_loras(source, [(narrow, 1.0)], output)
    with pytest.raises(ValueError, match=r"transformer_blocks\.7\.attn\.to_q\.weight does not exist"):
        bake_loras(source, [(deep, 1.0)], output)
    fp8 = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in base.items()}
    save_file(fp8, tmp_path / "fp8.safetensors")
    lora = write_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="quantised"):
        bake_loras(tmp_path / "fp8.safetensors", [(lora, 1.0)], output)
    with pytest.raises(ValueError, match="is the input"):
        bake_loras(source, [(lora, 1.0)], source)
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    with pytest.raises(ValueError, match="whole pipeline"):
        bake_loras(tmp_path / "pipeline", [(lora, 1.0)], tmp_path / "new")
    save_file({**lora_tensors(), "x.y": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="unknown key"):
        bake_loras(source, [(tmp_path / "odd.safetensors", 1.0)], output)
    assert not output.exists()
