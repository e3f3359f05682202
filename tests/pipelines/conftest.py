import pytest
from model_files import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A complete tiny random Qwen-Image folder, written by stock diffusers."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers.DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
