"""Scales and where they come from, a base checkpoint, headers alone, fused modules, and what is written."""

import json
import struct
from pathlib import Path

import pytest
import torch
from lora_samples import samples
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_qwenimage.files import read_header
from diffusers_qwenimage.lora.architectures import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_LAYERED
from diffusers_qwenimage.lora.convert import convert_lora, convert_state_dict
from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.fused import fuse, split_fused
from diffusers_qwenimage.lora.read import parse_header_only, parse_lora, read_lora, read_state_dict
from diffusers_qwenimage.lora.report import report, report_lines
from diffusers_qwenimage.lora.updates import stored
from diffusers_qwenimage.lora.verify import compare_files
from diffusers_qwenimage.lora.write import stream_safetensors

M = "transformer_blocks.0.attn.to_q"
KOHYA_ALPHA = "lora_unet_transformer_blocks_0_attn_to_q.alpha"
PLAIN = samples()["diffusers_save_lora_weights_peft"]


def metadata(**fields: object) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in fields.items()})
    }


@pytest.mark.parametrize(
    ("given", "scale", "source"),
    [
        ({}, 1.0, "default"),
        (metadata(r=4, lora_alpha=8), 2.0, "metadata"),
        (metadata(r=4, lora_alpha=8, use_rslora=True), 4.0, "metadata"),
        (metadata(r=8, lora_alpha=8, rank_pattern={"to_q": 4}, alpha_pattern={"^" + M: 2}), 0.5, "metadata"),
        (
            {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 2}'},
            0.5,
            "metadata",
        ),  # SimpleTuner leaves the prefix
        ({"ss_network_alpha": "2"}, 1.0, "default"),
    ],
)
def test_the_scale_and_its_source(given: dict[str, str], scale: float, source: str) -> None:
    tensors = {key: tensor for key, tensor in PLAIN.tensors().items() if f".{M}." in key}
    (update,) = read_state_dict(tensors, metadata=given).updates
    assert (update.scale.value, update.scale.source) == (scale, source)


def test_an_alpha_key_counts_more_than_metadata() -> None:
    tensors = samples()["simpletuner_comfyui"].tensors(alpha=2.0)
    file = read_state_dict(tensors, metadata={"lora_adapter_metadata": '{"r": 4, "lora_alpha": 64}'})
    assert {(update.scale.value, update.scale.source) for update in file.updates} == {(0.5, "key")}


@pytest.mark.parametrize("name", ["ai_toolkit_lokr_full", "musubi_lokr_full"])
@pytest.mark.parametrize("alpha", [1e10, float("inf"), 4.0])
def test_the_alpha_of_whole_lokr_factors_is_ignored(name: str, alpha: float) -> None:
    tensors = samples()[name].tensors(alpha=alpha)
    file = read_state_dict(tensors)
    assert all(update.scale.is_one for update in file.updates)
    converted, _ = convert_state_dict(tensors, "comfyui")
    assert not any(key.endswith(".alpha") for key in converted)


@pytest.mark.parametrize(("alpha", "actions"), [(4, {"renamed"}), (8, {"folded"}), (3, {"folded"})])
def test_the_scale_of_whole_lokr_factors_by_peft(alpha: int, actions: set[str], tmp_path: Path) -> None:
    """PEFT multiplies whole factors by alpha / r; ComfyUI does not, so the scale goes into a factor."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = samples()["diffusion_pipe_lokr_peft"].tensors()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 4, "alpha": alpha}))
    conversion = convert_lora(folder, tmp_path / "out.safetensors", "comfyui")
    assert {step.action for step in conversion.steps} == actions
    update = read_lora(tmp_path / "out.safetensors").updates[0]
    w1, w2 = (tensors[f"diffusion_model.{update.module}.lokr_{name}"].double() for name in ("w1", "w2"))
    assert torch.equal(delta_weight(update), torch.kron(w1, w2) * alpha / 4)
    back = convert_lora(tmp_path / "out.safetensors", tmp_path / "back", "original")
    assert back.restored and (tmp_path / "back" / "adapter_config.json").exists()


def test_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(samples()["musubi_lora"].tensors(), path)
    file = parse_header_only(read_header(path), name="remote")
    facts = report(file)
    assert facts.scales == {"unknown": 14} and facts.formats == {"kohya": 42} and facts.problems == ()
    with pytest.raises(ValueError, match="only its header"):
        _ = file.updates[0].scale.value
    with pytest.raises(ValueError, match="Only the header"):
        file.updates[0].load("down")
    full = report(parse_lora(path))
    assert full.scales == {"0.5": 14} and full.published_size is False
    assert any("musubi-tuner" in line for line in report_lines(full))


def test_shapes_against_a_base_checkpoint(tmp_path: Path) -> None:
    lora, base = tmp_path / "lora.safetensors", tmp_path / "base.safetensors"
    save_file(PLAIN.tensors(), lora)
    shapes = {update.module: update.shape for update in read_lora(lora).updates}
    weights = {f"model.diffusion_model.{m}.weight": torch.zeros(s or ()) for m, s in shapes.items()}
    save_file(weights, base)
    assert read_lora(lora, base=base).problems == ()
    weights[f"model.diffusion_model.{M}.weight"] = torch.zeros(128, 128)
    save_file(weights, base)
    with pytest.raises(ValueError, match=r"\[64, 64\] for a parameter of shape \[128, 128\]"):
        read_lora(lora, base=base)
    del weights[f"model.diffusion_model.{M}.weight"]
    save_file(weights, base)
    with pytest.raises(ValueError, match=f"{M}.weight does not exist in the base checkpoint"):
        convert_lora(lora, tmp_path / "out.safetensors", "kohya", base=base)


def test_more_blocks_than_the_published_model_has() -> None:
    rank_one = {
        "transformer_blocks.60.attn.to_q.lora_down.weight": torch.ones(1, 3072),
        "transformer_blocks.60.attn.to_q.lora_up.weight": torch.ones(3072, 1),
    }
    with pytest.raises(ValueError, match="block 60 is named, but Qwen-Image has 60 blocks"):
        read_state_dict(rank_one)


def test_architectures_are_told_apart() -> None:
    tensors = PLAIN.tensors()
    assert read_state_dict(tensors).architecture is QWEN_IMAGE
    edit = {"modelspec.architecture": "Qwen-Image-Edit-Plus/lora"}
    assert read_state_dict(tensors, metadata=edit).architecture is QWEN_IMAGE_EDIT
    layered = samples()["layered_embedding_extra"].tensors()
    assert read_state_dict({**tensors, **layered}).architecture is QWEN_IMAGE_LAYERED


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_state_dict(tensors, "nunchaku")[0]


def test_fusing_and_splitting_unequal_ranks_and_missing_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank in (("to_q", 3), ("to_v", 2)):
        stem = f"transformer_blocks.0.attn.{name}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, 16, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(16, rank, generator=generator)
    joined = fused(tensors)
    up = joined["transformer_blocks.0.attn.to_qkv.lora_B.weight"]
    assert up.shape == (48, 5) and not up[16:32].any()
    assert joined["transformer_blocks.0.attn.to_qkv.lora_A.weight"].shape == (5, 16)
    again, _ = convert_state_dict(joined, "opensource")
    assert {key for key in again if not key.endswith("alpha")} == set(tensors)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_zero_factors_survive_fusing() -> None:
    """An untrained up factor is zero; with equal ranks it keeps its place."""
    tensors = {}
    for name in ("to_q", "to_k", "to_v"):
        stem = f"transformer_blocks.0.attn.{name}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
        tensors[f"{stem}.lora_up.weight"] = torch.zeros(16, 2) if name == "to_k" else torch.ones(16, 2)
    assert compare_files(read_state_dict(tensors), read_state_dict(fused(tensors))).same_bits


def test_a_shared_factor_is_not_taken_for_a_block_diagonal_one() -> None:
    sample = samples()["fused_qkv_for_nunchaku_runtime"].tensors()
    file = read_state_dict(sample)
    update = next(u for u in file.updates if u.module.endswith("to_qkv"))
    parts = split_fused(update, QWEN_IMAGE.parts(update.module) or ())
    assert [part.rank for part in parts] == [12, 12, 12]
    assert torch.equal(torch.cat([delta_weight(part) for part in parts]), delta_weight(update))


def test_parts_that_do_not_fit_are_not_fused() -> None:
    file = read_state_dict(samples()["diffsynth_train_remove_prefix_pipe_dit"].tensors())
    by_module = {update.module: update for update in file.updates}
    with pytest.raises(ValueError, match="differ in shape"):
        fuse("x", ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.2"], by_module)


@pytest.mark.parametrize("name", ["musubi_lora", "lycoris_loha", "lightx2v_extractor"])
def test_files_have_the_bytes_that_the_safetensors_library_writes(name: str, tmp_path: Path) -> None:
    tensors = samples()[name].tensors()
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    stream_safetensors(ours, [stored(key, tensor) for key, tensor in tensors.items()], {"format": "pt"})
    save_file(tensors, theirs, metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    with safe_open(ours, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_two_tensors_of_one_name_are_not_written(tmp_path: Path) -> None:
    two = [stored("a", torch.ones(1)), stored("a", torch.ones(1))]
    with pytest.raises(ValueError, match="Two tensors would be written as 'a'"):
        stream_safetensors(tmp_path / "out", two, {})


@pytest.mark.parametrize(
    ("target", "moment"), [("opensource", 1), ("opensource", 50), ("peft", 1), ("peft", 35)]
)
def test_an_interrupted_conversion_leaves_nothing(target: str, moment: int, tmp_path: Path) -> None:
    """Stopped while writing (42 tensors, 28 for PEFT) or while comparing (14 updates)."""
    source, output = tmp_path / "source.safetensors", tmp_path / "out"
    save_file(samples()["qwen_image_lightning"].tensors(), source)
    calls = []

    def stop(num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_lora(source, output, target, progress=stop)
    assert list(tmp_path.iterdir()) == [source]


def test_a_changed_file_is_not_passed_off_as_its_source(tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(samples()["musubi_lora"].tensors(), source)
    convert_lora(source, output, "opensource")
    data = bytearray(output.read_bytes())
    data[-1] ^= 1
    output.write_bytes(data)
    with pytest.raises(ValueError, match="no record of an original that it still matches"):
        convert_lora(output, tmp_path / "back.safetensors", "original")
    assert not convert_lora(output, tmp_path / "kohya.safetensors", "kohya").restored


def test_a_record_that_unpacks_without_end_is_not_followed(tmp_path: Path) -> None:
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(b" " * 200_000_000, 9)).decode()
    record = json.dumps({"version": 1, "format": "kohya", "sha256": "0", "source": bomb})
    path = tmp_path / "bomb.safetensors"
    save_file(PLAIN.tensors(), path, metadata={"diffusers_qwenimage.provenance": record})
    assert convert_lora(path, tmp_path / "out.safetensors", "kohya").comparison.exact


def test_peft_folders_there_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(samples()["peft_adapter_dir"].tensors(), folder / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "note": "mine"}'
    (folder / "adapter_config.json").write_text(config)
    convert_lora(folder, tmp_path / "out.safetensors", "kohya")
    assert float(load_file(tmp_path / "out.safetensors")[KOHYA_ALPHA]) == 6.0
    back = convert_lora(tmp_path / "out.safetensors", tmp_path / "back", "peft")
    assert back.restored
    assert (tmp_path / "back" / "adapter_config.json").read_text() == config
    first, second = (p / "adapter_model.safetensors" for p in (folder, tmp_path / "back"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ValueError, match="not a PEFT adapter folder"):
        convert_lora(folder, tmp_path, "peft")


def test_scales_that_a_target_cannot_state_are_refused() -> None:
    tensors = samples()["musubi_lora"].tensors(alpha=0.1)
    with pytest.raises(ValueError, match="no place for a scale"):
        convert_state_dict(tensors, "diffsynth")
    third = {key: t for key, t in PLAIN.tensors().items() if f".{M}." in key}
    rslora = metadata(r=4, lora_alpha=1, use_rslora=True)
    assert convert_state_dict(third, "kohya", metadata=rslora)[0]  # 1 / sqrt(4) is exact
    three = {key: t[:3].clone() if "lora_A" in key else t[:, :3].clone() for key, t in third.items()}
    with pytest.raises(ValueError, match="no fp32 alpha gives the scale 0.57735"):
        convert_state_dict(three, "kohya", metadata=metadata(r=3, lora_alpha=1, use_rslora=True))


def test_the_header_stays_readable_with_any_metadata(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    odd = {"quote": '"\\', "line": "a\nb", "emoji": "🌱", "nul": "\0"}
    stream_safetensors(path, [stored("a", torch.ones(2))], odd)
    assert read_header(path).metadata == odd
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert length % 8 == 0
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == odd
