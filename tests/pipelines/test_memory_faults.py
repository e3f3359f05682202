"""Memory runs out at any point, of placing or of a picture: the pipeline works afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import write_model
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.offload import streamed

CALL = {"negative_prompt": " ", "height": 32, "width": 48, "num_inference_steps": 2, "seed": 1}
BF16 = torch.bfloat16


class Operations(TorchDispatchMode):
    """Counts operations of this thread; one of them finds no memory.

    Args:
        fails: which one; 0: none.
    """

    def __init__(self, fails: int = 0) -> None:
        super().__init__()
        self.count = 0
        self.failed = ""
        self._fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self._fails:
            self.failed = f"{func}, operation {self.count}"
            raise torch.OutOfMemoryError(f"injected: {self.failed}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), dtype=BF16, num_layers=4)


def load(folder: Path) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(folder, dtype=BF16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: QwenImagePipeline) -> np.ndarray:
    pipe.clear_prompt_cache()
    picture: np.ndarray = pipe("a cat", output_type="np", **CALL).images
    return picture


def enable(pipe: QwenImagePipeline) -> None:
    pipe.enable_vram_management(vram_limit=0, vram_buffer=0)


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    return draw(load(folder))


def number_of_operations(work: Callable[[], Any]) -> int:
    with Operations() as operations:
        work()
    return int(operations.count)


def points(count: int, number: int) -> list[int]:
    """So many operations of a number, spread evenly; the number itself can differ a little between runs."""
    return sorted({1 + round(i * 0.98 * number / (count - 1)) for i in range(count)})


def fails(work: Callable[[], Any], point: int) -> str:
    """Run until an operation fails; which one, "" if there are not so many."""
    try:
        with Operations(fails=point) as operations:
            work()
    except torch.OutOfMemoryError as error:
        assert "injected" in str(error)
    return str(operations.failed)


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_a_picture_fails(count: int, folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder)
    enable(pipe)
    draw(pipe)
    number = number_of_operations(lambda: draw(pipe))
    for point in points(count, number):
        failed = fails(lambda: draw(pipe), point)
        assert failed and streamed(pipe.transformer) is not None
        assert np.array_equal(draw(pipe), expected), failed
    assert number_of_operations(lambda: draw(pipe)) == number, "slots were lost: fewer copies ahead"


@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_enabling_fails(count: int, folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder)
    number = number_of_operations(lambda: enable(pipe))
    for point in points(count, number):
        pipe = load(folder)
        failed = fails(lambda pipe=pipe: enable(pipe), point)  # type: ignore[misc]
        assert failed
        assert np.array_equal(draw(pipe), expected), failed
        enable(pipe)
        assert np.array_equal(draw(pipe), expected), failed


@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_planning_anew_fails(count: int, folder: Path, expected: np.ndarray) -> None:
    pipe = load(folder)
    enable(pipe)
    number = number_of_operations(lambda: pipe.enable_vram_management(vram_buffer=0))
    for point in points(count, number):
        enable(pipe)
        failed = fails(lambda: pipe.enable_vram_management(vram_buffer=0), point)
        assert failed
        assert np.array_equal(draw(pipe), expected), failed
