"""A tiny random model under ./models and a dataset of random pictures."""

from pathlib import Path

import pytest
from model_files import write_model
from training_data import write_dataset


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `models/Qwen/Qwen-Image`; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "models" / "Qwen" / "Qwen-Image")
    return folder


@pytest.fixture
def workplace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: ./models is there, and ./data with 4 pictures of 32x48 pixels."""
    (tmp_path / "models").symlink_to(models / "models")
    write_dataset(tmp_path / "data", num=4, size=(48, 32))
    monkeypatch.chdir(tmp_path)
    return tmp_path
