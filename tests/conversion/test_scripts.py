"""The scripts of conversion/, run as a user runs them."""

import subprocess
import sys
from pathlib import Path

from lora_samples import samples
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[2] / "conversion"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_diffsynth_to_opensource_and_back(tmp_path: Path) -> None:
    source, opensource, back = (tmp_path / f"{name}.safetensors" for name in ("source", "open", "back"))
    save_file(
        samples()["diffsynth_train_remove_prefix_pipe_dit"].tensors(), source, metadata={"format": "pt"}
    )
    done = run("diffsynth_to_opensource.py", source, opensource)
    assert done.returncode == 0 and "bound 0" in done.stdout, done.stderr
    keys = load_file(opensource)
    assert float(keys["transformer_blocks.0.attn.to_q.alpha"]) == 4
    assert all(key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in keys)
    done = run("opensource_to_diffsynth.py", opensource, back)
    assert done.returncode == 0 and "byte by byte" in done.stdout, done.stderr
    assert back.read_bytes() == source.read_bytes()


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(samples()["lycoris_lokr_full"].tensors(), source)
    done = run("convert_lora.py", source, output, "--to", "portable")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "full rank" in done.stderr
    assert not output.exists()
