"""Repairs: every known damage becomes a file that loads exactly; what cannot be known is refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from lora_made import MODULES, lora_tensors, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_qwenimage.lora.consumers import CONSUMERS
from diffusers_qwenimage.lora.doctor import diagnose, repair_lora
from diffusers_qwenimage.lora.predict import predict
from diffusers_qwenimage.lora.read import read_header, read_lora, read_state_dict
from diffusers_qwenimage.lora.verify import compare_files

TWO = MODULES[:2]


def repaired(tensors: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> list[str]:
    """Repair tensors that were saved, check the result, and return what was found."""
    save_file(tensors, folder / "damaged.safetensors", metadata=metadata)
    repair = repair_lora(folder / "damaged.safetensors", folder / "repaired.safetensors")
    assert repair.target == "opensource" and repair.conversion is not None
    file = read_lora(folder / "repaired.safetensors")
    verdicts = {p.consumer: p.verdict for p in predict(file, CONSUMERS)}
    assert set(verdicts.values()) <= {"exact", "nothing"} and verdicts["diffusers 0.35.2"] == "exact"
    assert diagnose(folder / "repaired.safetensors").healthy
    return [finding.text for finding in repair.diagnosis.findings]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("diffsynth-pipe", "pipe.dit. was not removed"),
        ("double-prefix", "is there twice"),
        ("musubi-broken", "musubi-tuner's converter"),
        ("diffusers-named", "name of the PEFT adapter"),
        ("lora-transformer", "lora_transformer_"),
        ("checkpoint-prefix", "model.diffusion_model."),
    ],
)
def test_damaged_spellings(name: str, said: str, tmp_path: Path) -> None:
    tensors = lora_tensors(name, alpha=None, dtype=torch.bfloat16)
    (text,) = repaired(tensors, tmp_path)
    assert said in text
    good = read_state_dict(lora_tensors("kohya", alpha=None, dtype=torch.bfloat16))
    assert compare_files(good, read_lora(tmp_path / "repaired.safetensors")).exact


def test_mixed_halves(tmp_path: Path) -> None:
    """Some modules, and even the halves of one, in another spelling."""
    first = lora_tensors("diffusers-old", alpha=None, modules=MODULES[:3])
    second = lora_tensors("diffusers", alpha=None, modules=MODULES[3:])
    key = f"transformer.{MODULES[0]}"
    first[f"{key}.lora_B.weight"] = first.pop(f"{key}.lora.up.weight")
    (text,) = repaired({**first, **second}, tmp_path)
    assert "mixes spellings" in text


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    bare, prefixed = (lora_tensors(name, modules=TWO) for name in ("opensource", "onetrainer-legacy"))
    texts = repaired({**bare, **prefixed}, tmp_path)
    assert texts[0].startswith("6 tensors were there twice with the same bits, such as transformer")
    other = lora_tensors("onetrainer-legacy", modules=TWO, seed=5)
    save_file({**bare, **other}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="are the same tensor of one module"):
        repair_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_alpha_without_factors(tmp_path: Path) -> None:
    tensors = {**lora_tensors(modules=TWO), "proj_out.alpha": torch.tensor(4.0)}
    (text,) = repaired(tensors, tmp_path)
    assert text == "1 alpha keys belong to no factors, such as proj_out.alpha"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{not json", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps({"transformer.r": 0, "transformer.lora_alpha": 1}), "give no scale"),
        (json.dumps({"transformer.r": 64, "transformer.lora_alpha": 64}), "does not fit the tensors"),
        (json.dumps({"r": 4, "lora_alpha": 4}), "no prefix transformer."),
    ],
)
def test_bad_metadata(value: str, said: str, tmp_path: Path) -> None:
    tensors = lora_tensors("diffusers", alpha=None, modules=TWO)
    (text,) = repaired(tensors, tmp_path, {"lora_adapter_metadata": value})
    assert said in text
    assert all(u.scale.is_one for u in read_lora(tmp_path / "repaired.safetensors").updates)


def test_metadata_beside_alpha_keys(tmp_path: Path) -> None:
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    (text,) = repaired(lora_tensors("kohya", modules=TWO), tmp_path, {"lora_adapter_metadata": config})
    assert "apply both" in text
    assert {u.scale.value for u in read_lora(tmp_path / "repaired.safetensors").updates} == {0.5}


def test_unprefixed_metadata_keeps_its_scale(tmp_path: Path) -> None:
    config = json.dumps({"r": 4, "lora_alpha": 8})
    repaired(lora_tensors("diffusers", alpha=None, modules=TWO), tmp_path, {"lora_adapter_metadata": config})
    assert {u.scale.value for u in read_lora(tmp_path / "repaired.safetensors").updates} == {2.0}


def test_an_uncertain_scale_is_not_guessed(tmp_path: Path) -> None:
    config = json.dumps({"transformer.r": 64, "transformer.lora_alpha": 32})
    tensors = lora_tensors("diffusers", alpha=None, modules=TWO)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(ValueError, match=r"the scale it means \(32 for rank 64\) is not certain"):
        repair_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_hashes(tmp_path: Path) -> None:
    tensors = lora_tensors(modules=TWO)
    path = write_lora(tmp_path / "a.safetensors", modules=TWO)
    data = path.read_bytes()[read_header(path).data_start :]
    digest = hashlib.sha256(data).hexdigest()
    save_file(tensors, path, metadata={"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"})
    assert diagnose(path).healthy
    (text,) = repaired(tensors, tmp_path, {"sshs_model_hash": "0" * 64, "title": "kept"})
    assert text == "sshs_model_hash is not the hash of the data"
    assert read_header(tmp_path / "repaired.safetensors").metadata["title"] == "kept"


def test_unknown_keys_are_dropped_on_request_only(tmp_path: Path) -> None:
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({**lora_tensors(modules=TWO), "bundle_emb.x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="unknown key 'bundle_emb.x'"):
        repair_lora(path, output)
    repair = repair_lora(path, output, drop_unknown=True)
    assert repair.diagnosis.findings[0].text == "1 unknown keys are left out, as asked: bundle_emb.x"
    assert load_file(output).keys() == lora_tensors(modules=TWO).keys()


def test_what_is_missing_is_not_invented(tmp_path: Path) -> None:
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = lora_tensors(modules=TWO)
    save_file({k: v for k, v in tensors.items() if not k.endswith("to_q.lora_up.weight")}, path)
    with pytest.raises(ValueError, match="has no partner"):
        repair_lora(path, output)
    broken = {key: value.clone() for key, value in lora_tensors("diffsynth-pipe", modules=TWO).items()}
    broken[next(iter(broken))][0, 0] = float("nan")
    save_file(broken, path)
    with pytest.raises(ValueError, match="NaN"):
        repair_lora(path, output)
    assert not output.exists()


def test_a_healthy_file_is_not_copied(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", "kohya")
    repair = repair_lora(path, tmp_path / "b.safetensors")
    assert repair.diagnosis.healthy and repair.conversion is None
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(ValueError, match="is the input"):
        repair_lora(path, path)


def test_lokr_takes_a_target_that_holds_it(tmp_path: Path) -> None:
    module = f"pipe.dit.{MODULES[0]}"
    tensors = {f"{module}.lokr_w1": torch.randn(4, 4), f"{module}.lokr_w2": torch.randn(12, 12)}
    save_file(tensors, tmp_path / "a.safetensors")
    repair = repair_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui")
    assert repair.conversion is not None and repair.conversion.comparison.exact
