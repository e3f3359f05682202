"""`ModelConfig` finds files and changes nothing."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer

from diffusers_qwenimage.diffsynth import ModelConfig

MODEL = "Qwen/Qwen-Image"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"path": "x.safetensors", "model_id": MODEL},
        {"path": "x.safetensors", "origin_file_pattern": "vae/"},
        {"path": []},
        {"model_id": MODEL, "download_source": "github"},
        {"model_id": MODEL, "download_source": "huggingface", "download_resource": "ModelScope"},
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ModelConfig(**arguments)


def test_unknown_arguments_are_errors_and_fields_cannot_be_set() -> None:
    with pytest.raises(TypeError, match="offload_devise"):
        ModelConfig(model_id=MODEL, offload_devise="cpu")  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        ModelConfig(model_id=MODEL).path = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "hub"),
    [
        ({}, "modelscope"),
        ({"download_source": "huggingface"}, "huggingface"),
        ({"download_resource": "HuggingFace"}, "huggingface"),
        ({"download_resource": "ModelScope", "download_source": "modelscope"}, "modelscope"),
    ],
)
def test_modelscope_is_the_default_hub(arguments: dict[str, Any], hub: str) -> None:
    assert ModelConfig(model_id=MODEL, **arguments).hub == hub


def test_the_path_is_the_first_argument() -> None:
    assert ModelConfig("a.safetensors").find() == [[Path("a.safetensors")]]
    assert ModelConfig(["a", "b"]).find() == [[Path("a"), Path("b")]]


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
@pytest.mark.parametrize(
    "pattern",
    [
        "vae/diffusion_pytorch_model.safetensors",
        ["vae/*.safetensors", "transformer/diffusion_pytorch_model*.safetensors"],
        "tokenizer/",
        None,
    ],
)
def test_files_come_from_both_hubs_to_the_local_folder(
    source: str,
    pattern: Any,
    hub: HubServer,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add_folder(MODEL, model_folder)
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(model_id=MODEL, origin_file_pattern=pattern, download_source=source)
    before = repr(config)
    groups = config.find()
    assert all(len({file.parent for file in group}) == 1 for group in groups)
    for file in (file for group in groups for file in group):
        inside = file.relative_to(Path("models") / MODEL)
        assert file.read_bytes() == (model_folder / inside).read_bytes()
    hub.stop()
    assert config.find() == groups
    elsewhere = ModelConfig(
        model_id=MODEL, origin_file_pattern=pattern, skip_download=True, local_model_path="x"
    )
    with pytest.raises(FileNotFoundError, match="switched off"):
        elsewhere.find()
    assert repr(config) == before


def test_the_environment_of_diffsynth_does_not_beat_arguments(
    hub: HubServer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "wrong"))
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "huggingface")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    hub.add_folder(MODEL, model_folder)
    config = ModelConfig(
        model_id=MODEL,
        origin_file_pattern="vae/*.safetensors",
        download_source="modelscope",
        local_model_path=tmp_path / "right",
        offload_dtype=torch.float8_e4m3fn,
    )
    assert config.find()[0][0].is_relative_to(tmp_path / "right")
    assert all(request.path.startswith("/api/v1/") for request in hub.requests)
