"""Both hub clients pointed at a local server, with caches of their own."""

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import modelscope_hub._download
import modelscope_hub.config
import pytest
from hub_server import HubServer, serve
from model_files import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in diffusers' layout; not to be changed."""
    return write_model(tmp_path_factory.mktemp("model") / "Qwen-Image")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server for both hubs. The clients use it, cache below `tmp_path`, and hardly wait between retries."""
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.01)))
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0.01)
    server = HubServer()
    for running in serve(server):
        use_endpoint(running.endpoint, tmp_path / "caches", monkeypatch)
        yield running


def use_endpoint(endpoint: str, caches: Path, monkeypatch: pytest.MonkeyPatch, token: str = "") -> None:
    """Set what the clients otherwise read from the environment."""
    constants = huggingface_hub.constants
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(caches / "huggingface"))
    config = modelscope_hub.config.HubConfig(
        endpoint=endpoint, cache_dir=caches / "modelscope", config_dir=caches / "settings", token=token
    )
    monkeypatch.setattr(modelscope_hub.config, "_default_config", config)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
