"""A run that was killed, stopped or spread over processes ends as the uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_data import arguments, config

from diffusers_qwenimage.training.checkpoints import list_states, load_state
from diffusers_qwenimage.training.logs import read_log
from diffusers_qwenimage.training.trainer import train

# Everything that could break the equality: dropout, recomputation, accumulation, clipping, moving averages.
RUN = {
    "max_steps": 80,
    "save_steps": 10,
    "gradient_accumulation_steps": 2,
    "dataset_repeat": 3,
    "lora_dropout": 0.1,
    "caption_dropout": 0.2,
    "use_gradient_checkpointing": True,
    "ema_decay": 0.9,
    "lr_schedule": "cosine",
    "warmup_steps": 5,
    "lora_target_modules": "to_q,to_k,img_mod.1",
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_killed_at_step_37_of_80(workplace, dtype):
    run(output_path="whole", dtype=dtype, **RUN)
    process = start(output_path="out", dtype=dtype, **RUN)
    wait_for_steps(process, "out", 37)
    process.kill()
    process.wait()
    done = read_log(Path("out/log.csv"))[-1].step
    assert 37 <= done < 80
    assert [step for step, _ in list_states(Path("out"))][-1] <= done
    run(output_path="out", dtype=dtype, resume_from="latest", **RUN)
    assert_same_runs("whole", "out", steps=80)


def test_sigterm_saves_and_exits_with_0(workplace):
    settings = {**RUN, "max_steps": 60, "save_steps": 50}
    run(output_path="whole", **settings)
    process = start(**settings)
    wait_for_steps(process, "out", 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    done = read_log(Path("out/log.csv"))[-1].step
    assert done < 60 and [step for step, _ in list_states(Path("out"))] == [done]
    assert (Path("out") / f"step-{done}.safetensors").is_file()
    run(resume_from="latest", **settings)
    assert_same_runs("whole", "out", steps=60)


@pytest.mark.parametrize(
    "kind",
    [
        {"trainable_models": "dit"},
        {"trainable_models": "dit", "dtype": "bfloat16"},
        {"trainable_models": "dit,text_encoder"},
        {"trainable_models": "vae"},
        {"dtype": "bfloat16"},
    ],
)
def test_short_runs_resume(workplace, kind):
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, **kind}
    train(config(output_path="whole", **settings))
    train(config(output_path="out", **settings))
    remove_state("out", 4)
    train(config(output_path="out", resume_from="latest", **settings))
    assert_same_runs("whole", "out", steps=4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_resume_and_equal_one(workplace, dtype):
    """Two processes are one with accumulation, up to the order of additions; and they resume bit for bit."""
    settings = {**RUN, "max_steps": 80, "lora_dropout": 0.0, "dtype": dtype}
    pair = {**settings, "gradient_accumulation_steps": 1}
    assert start(processes=2, output_path="whole", **pair).wait(timeout=300) == 0
    process = start(processes=2, output_path="out", **pair)
    wait_for_steps(process, "out", 37)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert read_log(Path("out/log.csv"))[-1].step < 80
    assert start(processes=2, output_path="out", resume_from="latest", **pair).wait(timeout=300) == 0
    assert_same_runs("whole", "out", steps=80)
    if dtype == "bfloat16":  # sums in another order are another rounding, and 80 steps of Adam spread it
        return
    train(config(output_path="one", **settings))
    for one, two in zip(read_log(Path("one/log.csv")), read_log(Path("whole/log.csv")), strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-4), one.step  # sums in another order, 80 steps
    final = load_file("one/step-80.safetensors"), load_file("whole/step-80.safetensors")
    for name, tensor in final[0].items():
        torch.testing.assert_close(tensor, final[1][name], rtol=1e-3, atol=1e-4)


def run(**changes):
    """A whole run in a process of its own, as a user's; this one's libraries may be in another state."""
    assert start(**changes).wait(timeout=200) == 0, Path("process.log").read_text(encoding="utf-8")


def start(processes=1, **changes):
    """`qwenimage train` in a process of its own, or in several."""
    launcher = [sys.executable]
    if processes > 1:  # accelerate's own launcher starts several CPU processes with mpirun only
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line = [*launcher, "-m", "diffusers_qwenimage", "train", *arguments(**changes)]
    with Path("process.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            line,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
                "ACCELERATE_USE_CPU": "true",
                "DS_ACCELERATOR": "cpu",
            },
        )


def wait_for_steps(process, output, steps):
    deadline = time.monotonic() + 120
    path = Path(output) / "log.csv"
    while not path.is_file() or path.read_text(encoding="utf-8").count("\n") < steps + 1:
        assert process.poll() is None, Path("process.log").read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def remove_state(output, step):
    (Path(output) / f"step-{step}.state").rename(Path(output) / "gone")


def assert_same_runs(first, second, *, steps):
    logs = [read_log(Path(folder) / "log.csv") for folder in (first, second)]
    facts = [[(r.step, r.epoch, r.loss, r.learning_rate, r.grad_norm) for r in log] for log in logs]
    assert [fact[0] for fact in facts[0]] == list(range(1, steps + 1))
    assert facts[0] == facts[1]
    states = [load_state(Path(folder) / f"step-{steps}.state") for folder in (first, second)]
    assert states[0].trained.keys() == states[1].trained.keys()
    assert all(torch.equal(value, states[1].trained[name]) for name, value in states[0].trained.items())
    weights = [load_file(Path(folder) / f"step-{steps}.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"sharding": "full"},
        {"sharding": "full", "trainable_models": "dit"},
        {"sharding": "optimizer", "use_gradient_checkpointing": True, "ema_decay": 0.9},
        {"sharding": "zero2", "trainable_models": "dit"},
        {"sharding": "zero3", "use_gradient_checkpointing": True},
        {"sharding": "zero3", "trainable_models": "dit"},
    ],
    ids=str,
)
def test_sharded_training_equals_one_process_and_resumes(workplace, kind):
    """Weights, gradients and states spread over two processes: whole tensors are saved."""
    needs_deepspeed(kind["sharding"])
    settings = {"max_steps": 6, "save_steps": 3, "validation_prompts": "a dot", "validation_size": 32, **kind}
    settings["validation_inference_steps"] = 2
    train(config(output_path="one", gradient_accumulation_steps=2, **{**settings, "sharding": "none"}))
    assert start(processes=2, output_path="whole", **settings).wait(timeout=300) == 0, log_of_process()
    assert start(processes=2, output_path="out", **settings).wait(timeout=300) == 0, log_of_process()
    remove_state("out", 6)
    again = start(processes=2, output_path="out", resume_from="latest", **settings)
    assert again.wait(timeout=300) == 0, log_of_process()
    assert_same_runs("whole", "out", steps=6)
    assert (Path("whole") / "samples" / "step-6.png").is_file()
    one, two = load_file("one/step-6.safetensors"), load_file("whole/step-6.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # sums in another order, 6 steps of Adam
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_other_models_as_one(workplace):
    settings = {"trainable_models": "text_encoder,vae", "max_steps": 3, "save_steps": 3}
    train(config(output_path="one", gradient_accumulation_steps=2, **settings))
    assert start(processes=2, output_path="two", **settings).wait(timeout=300) == 0, log_of_process()
    one, two = load_file("one/step-3.safetensors"), load_file("two/step-3.safetensors")
    assert one.keys() == two.keys()
    for (
        name,
        tensor,
    ) in one.items():  # sums in another order; biases of keys have nothing but their rounding as a
        # gradient, of which Adam makes steps of a hundredth
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2.yaml", "fsdp2_optimizer.yaml", "zero2.yaml", "zero3.yaml"])
def test_configs_for_several_processes(workplace, name):
    """They start and take steps with the tiny model, on two processes."""
    needs_deepspeed(name)
    path = Path(__file__).parents[2] / "examples" / "model_training" / "configs" / name
    settings = {"config": path, "lora_base_model": None, "trainable_models": "dit", "max_steps": 2}
    assert start(processes=2, **settings).wait(timeout=300) == 0, log_of_process()
    assert [record.step for record in read_log(Path("out/log.csv"))] == [1, 2]
    base = load_file("models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model.safetensors")
    saved = load_file(next(Path("out").glob("*.safetensors")))
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in base.items()}
    assert sum(not torch.equal(tensor, base[name]) for name, tensor in saved.items()) > 40


def needs_deepspeed(name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", exc_type=ImportError)


def log_of_process():
    return Path("process.log").read_text(encoding="utf-8")[-4000:]
