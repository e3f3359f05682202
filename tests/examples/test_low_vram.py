"""The example of a low-memory card, with the small model inside the package."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_draws_within_the_smallest_budget(tmp_path: Path) -> None:
    script = EXAMPLES / "model_inference_low_vram" / "Qwen-Image-tiny.py"
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "from pinned memory" in done.stdout and "expected peak" in done.stdout
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (256, 256)
        red, green, blue = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert red > green + 10 and red > blue + 10  # a red star on white
