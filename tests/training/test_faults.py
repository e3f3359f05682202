"""What goes wrong ends as promised: a clear error, and the last good checkpoint stays."""

import logging
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_data import arguments, config, open_trainer, random_picture

from diffusers_qwenimage.cli import main
from diffusers_qwenimage.training.cache import Encoders, TensorCache
from diffusers_qwenimage.training.checkpoints import State, find_state, list_states, load_state, save_state
from diffusers_qwenimage.training.data import BadImage, inspect_rows
from diffusers_qwenimage.training.guard import Diverged, Guard
from diffusers_qwenimage.training.metadata import read_rows
from diffusers_qwenimage.training.models import find_models
from diffusers_qwenimage.training.stopping import output_lock
from diffusers_qwenimage.training.trainer import train


def test_kill_while_saving_never_costs_a_finished_state(tmp_path):
    draw = random.Random(0)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            step = max((step for step, _ in list_states(tmp_path)), default=0)
            while True:
                step += 1
                save_state(tmp_path, made_state(step), keep=2)
        finished = []
        deadline = time.monotonic() + draw.uniform(0.02, 0.25)
        while time.monotonic() < deadline:
            finished = [step for step, _ in list_states(tmp_path)] or finished
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if finished:
            state = load_state(find_state(tmp_path, "latest"))
            assert state.step >= max(finished)
            assert torch.equal(state.trained["weight"], torch.full((500, 500), float(state.step)))
    assert list_states(tmp_path)


def made_state(step):
    return State(
        step=step,
        trained={"weight": torch.full((500, 500), float(step))},
        optimizer={
            "state": {0: {"exp_avg": torch.full((500,), float(step)), "step": torch.tensor(float(step))}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}],
        },
        values={},
    )


def test_damaged_state_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, made_state(step), keep=3)
    for name in ("optimizer.safetensors", "state.json"):
        path = find_state(tmp_path, "latest") / name
        path.write_bytes(path.read_bytes()[:-20])
    assert load_state(find_state(tmp_path, "latest")).step == 1
    shutil.rmtree(tmp_path / "step-1.state")
    with pytest.raises(ValueError, match="no complete trainer state.*damaged"):
        find_state(tmp_path, "latest")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_while_writing_a_state(small_disk):
    save_state(small_disk, made_state(1), keep=2)
    (small_disk / "other").write_bytes(b"x" * 2_400_000)
    with pytest.raises(OSError, match="No space|os error 28|StorageFull"):
        save_state(small_disk, made_state(2), keep=2)
    assert [path.name for path in small_disk.iterdir() if path.name != "other"] == ["step-1.state"]
    assert load_state(find_state(small_disk, "latest")).step == 1


def test_full_disk_in_a_run(workplace, small_disk, capsys):
    line = arguments(output_path=small_disk, cache_path="cache", max_steps=2, save_steps=2)
    assert main(["train", *line]) == 0
    before = (small_disk / "step-2.safetensors").read_bytes()
    (small_disk / "other").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 600_000))
    line = arguments(
        output_path=small_disk, cache_path="cache", max_steps=4, save_steps=2, resume_from="latest"
    )
    assert main(["train", *line]) == 2
    message = capsys.readouterr().err
    assert "is full: a checkpoint needs" in message and "last good checkpoint is untouched" in message
    assert (small_disk / "step-2.safetensors").read_bytes() == before
    (small_disk / "other").unlink()
    assert main(["train", *line]) == 0
    assert (small_disk / "step-4.safetensors").is_file()


def test_nan_loss_stops_with_the_samples_and_saves_nothing(workplace, caplog):
    with pytest.raises(Diverged, match=r"3 steps in a row were skipped.*the loss (nan|inf).* with \d\.png"):
        train(config(learning_rate=1e30, max_grad_norm=0.0, max_steps=20, save_steps=1000, max_bad_steps=3))
    assert "is skipped for the loss" in caplog.text
    assert not list(Path("out").glob("step-*"))


def test_guard_skips_spikes():
    guard = Guard(spike_factor=5, max_bad=2)
    assert all(guard.judge(1.0, 1.0 + i / 100) == "" for i in range(20))
    assert guard.judge(1.0, 30.0) == "a gradient norm of 30; usual is 1.1"
    again = Guard(spike_factor=5, max_bad=2)
    again.load(guard.state())
    again.stop_if_diverged(21, "it", ["a"])
    assert again.judge(float("nan"), 1.0) == "the loss nan"
    with pytest.raises(Diverged, match="2 steps in a row"):
        again.stop_if_diverged(22, "the loss nan", ["a.png"])
    assert guard.judge(1.0, 2.0) == "" and guard.bad_in_a_row == 0 and guard.skipped == 1


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_picture_that_goes_bad_in_the_run(workplace, policy, caplog):
    trainer = open_trainer(config(cache=False, on_bad_image=policy, max_steps=8))
    Path("data/1.png").write_bytes(b"broken")
    if policy == "error":
        with pytest.raises(BadImage, match="1.png has changed"):
            trainer.run(None)
        return
    trainer.run(None)
    assert caplog.text.count("1.png has changed since the start of the run. Another picture") == 1
    assert (Path("out") / "step-8.safetensors").is_file() or (Path("out") / "epoch-1.safetensors").is_file()


def test_interrupted_cache_build(workplace):
    for index in range(12):
        random_picture((96, 96), 50 + index).save(f"data/more{index}.png")
    Path("data/metadata.csv").unlink()
    settings = config()
    samples = inspect_rows(read_rows(settings), settings, progress=False)

    def encoders(folder):
        files = find_models(settings)
        return Encoders(files, TensorCache(Path(folder)), dtype=torch.float32, device=torch.device("cpu"))

    encoders("whole").fill(samples, ["a"], progress=False)
    for wanted in (1, 6):
        child = os.fork()
        if child == 0:
            encoders("cache").fill(samples, ["a"], progress=False)
            os._exit(0)
        while len(list(Path("cache").rglob("[!.]*.safetensors"))) < wanted:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(list(Path("cache").rglob("[!.]*.safetensors"))) < 17
    encoders("cache").fill(samples, ["a"], progress=False)
    whole, again = (
        {path.name: path.read_bytes() for path in Path(folder).rglob("[!.]*.safetensors")}
        for folder in ("whole", "cache")
    )
    assert whole == again and len(whole) == 17


def test_one_run_per_folder_and_no_silent_overwriting(workplace):
    with (
        output_lock(Path("out"), held_by_us=True),
        pytest.raises(ValueError, match="Another run is training in out"),
    ):
        train(config(max_steps=1))
    train(config(max_steps=1))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run. Pass --resume_from latest"):
        train(config(max_steps=1))


def test_a_run_goes_on_where_it_is_and_keeps_what_it_wrote(tmp_path, workplace):
    settings = {"max_steps": 4, "save_steps": 1}
    train(config(**settings, keep_states=4))
    with pytest.raises(ValueError, match=r"holds step-4.state, which going on from out/step-1"):
        train(config(**settings, resume_from="out/step-1.state"))
    train(
        config(max_steps=2, save_steps=1, keep_states=1, output_path="branch", resume_from="out/step-1.state")
    )
    assert [step for step, _ in list_states(Path("branch"))] == [2]
    shutil.copytree("out/step-4.state", "branch/step-4.state")
    save_state(Path("branch"), made_state(3), keep=1)
    assert [step for step, _ in list_states(Path("branch"))] == [3]


def test_resuming_a_finished_run_returns_its_weights(workplace):
    first = train(config(num_epochs=1))
    assert first.name == "epoch-0.safetensors"
    assert train(config(num_epochs=1, resume_from="latest")) == first
    first.unlink()
    with pytest.raises(FileNotFoundError, match="epoch-0.safetensors of the saved state are not there"):
        train(config(num_epochs=1, resume_from="latest"))


def test_resuming_something_else_is_refused_or_said(workplace, caplog):
    train(config(max_steps=2))
    with pytest.raises(ValueError, match="keep lora_rank"):
        train(config(max_steps=3, lora_rank=2, resume_from="latest"))
    with pytest.raises(ValueError, match="other trained weights"):
        train(config(max_steps=3, lora_target_modules="to_q", resume_from="latest"))
    random_picture((48, 32), 99).save("data/0.png")
    with caplog.at_level(logging.WARNING):
        train(config(max_steps=3, resume_from="latest"))
    assert "differ from those of the saved state" in caplog.text
