"""On the small model inside the package: training learns, and the examples run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_data import config, open_trainer

from diffusers_qwenimage.loading import default_checkpoint
from diffusers_qwenimage.training.plan import Slot

EXAMPLES = Path(__file__).parents[2] / "examples"
EMOJI = EXAMPLES / "datasets" / "emoji"


@pytest.mark.parametrize("kind", [{}, {"trainable_models": "dit", "learning_rate": 1e-3}])
def test_loss_on_emoji_falls(tmp_path, monkeypatch, kind):
    """The shorter variant of `test_new_colour`: pictures of 64x64, and the loss instead of the judge."""
    monkeypatch.chdir(tmp_path)
    rows = (EMOJI / "metadata.csv").read_text(encoding="utf-8").splitlines()[:5]
    Path("four.csv").write_text("\n".join(rows), encoding="utf-8")
    settings = config(
        dataset_base_path=str(EMOJI),
        dataset_metadata_path="four.csv",
        model_id_with_origin_paths=None,
        height=64,
        width=64,
        batch_size=4,
        **{"max_steps": 30, "save_steps": 30, "lora_rank": 16, "learning_rate": 3e-3, **kind},
    )
    before, after = open_trainer(settings), open_trainer(settings)
    before.fill_cache()
    before.prepare()
    after.run(None)
    losses = []
    with torch.no_grad():
        for trainer in (before, after):
            slots = [[Slot(index=i, counter=10**6 + 4 * n + i) for i in range(4)] for n in range(4)]
            losses.append(sum(trainer.learner.loss(batch)[0].item() for batch in slots) / 4)
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.slow
def test_inference_example(tmp_path):
    run([sys.executable, str(EXAMPLES / "model_inference" / "Qwen-Image-tiny.py")], tmp_path)
    assert (tmp_path / "image.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_examples(tmp_path, kind):
    rows = (EMOJI / "metadata.csv").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "two.csv").write_text("\n".join(rows), encoding="utf-8")
    out = tmp_path / "out"
    line = ["bash", f"examples/model_training/{kind}/Qwen-Image-tiny.sh", "--output_path", str(out)]
    line += ["--dataset_metadata_path", str(tmp_path / "two.csv"), "--max_steps", "2", "--save_steps", "2"]
    line += ["--batch_size", "1", "--validation_inference_steps", "2"]
    run(line, EXAMPLES.parent)
    assert (out / "samples" / "step-2.png").is_file()
    script = EXAMPLES / "model_training" / f"validate_{kind}" / "Qwen-Image-tiny.py"
    run([sys.executable, str(script), str(out / "step-2.safetensors")], tmp_path)
    assert (tmp_path / "image.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_new_colour(tmp_path, monkeypatch, kind):
    """A colour that the base does not draw, judged from the pixels by `evaluate.py`, before and after."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "model_training"))
    monkeypatch.syspath_prepend(str(EXAMPLES / "tiny"))
    import new_colour

    full = kind == "full"
    new_colour.write_dataset(tmp_path / "data", 96)
    weights = new_colour.teach(tmp_path, default_checkpoint(), steps=new_colour.STEPS, full=full)
    assert evaluated(tmp_path)["only the new colour"] == 0
    after = evaluated(tmp_path, "--dit" if full else "--lora", str(weights))
    assert after["only the new colour"] >= 6 and after["by category"]["new colour"][0] >= 6  # of 8
    assert after["by category"]["known colours"][0] >= 3  # of 4


def evaluated(folder, *trained):
    """What `examples/tiny/evaluate.py` says of 8 pictures of the new colour and 4 of known ones."""
    line = [sys.executable, str(EXAMPLES / "tiny" / "evaluate.py"), "--library", "diffusers_qwenimage"]
    line += ["--new-colour", "light blue", "70", "175", "250", "--number", "8", "--steps", "12"]
    run([*line, "--json", str(folder / "judged.json"), *trained], folder)
    return json.loads((folder / "judged.json").read_text(encoding="utf-8"))


def run(line, folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        line, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
