"""`qwenimage env` and the command itself."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from diffusers_qwenimage.cli import main
from diffusers_qwenimage.cli.environment import environment, recommended, short_lines
from diffusers_qwenimage.version import __version__

GPU = {
    "device": "cuda:0",
    "name": "A GPU",
    "compute_capability": "9.0",
    "memory_total": 79.1,
    "memory_free": 78.5,
    "bfloat16": True,
}


def test_json_says_what_is_installed_and_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["diffusers"] == metadata.version("diffusers")
    assert (
        report["host"]["cpus"] == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True
    )
    assert 0 < report["host"]["memory_available"] <= report["host"]["memory_total"]
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert report["attention_backends"]["native"] == "works"
    assert report["fused_path"].startswith("triton" if report["gpus"] else "off (the device is cpu")
    assert report["attention_backends"]["_native_math"] == "works"
    if not torch.cuda.is_available():
        assert report["no_gpu_reason"]
        assert "torch_npu" in report["attention_backends"]["_native_npu"]
        assert report["recommended"]["device"] == "cpu"


def test_text_is_short_and_begins_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Recommended  ") and "Qwen-Image: " in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["GPU", "Host", "Fused", "Versions"]
    assert lines[-1].endswith("qwenimage env --all") and len(lines) <= 6


def test_all_shows_every_part_and_why_something_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--all"]) == 0
    text = capsys.readouterr().out
    for part in (
        "Recommended",
        "GPU",
        "Host ",
        "Python ",
        "Packages",
        "Attention backends ",
        "Embedded model",
    ):
        assert f"\n{part}" in f"\n{text}"
    assert f"  torch                {torch.__version__}\n" in text


def test_text_of_a_machine_with_a_gpu() -> None:
    report = environment(try_backends=False) | {
        "gpus": [GPU],
        "no_gpu_reason": None,
        "recommended": recommended([GPU], 100.0),
    }
    text = "\n".join(short_lines(report))
    assert "GPU          cuda:0, A GPU, compute capability 9.0, 78.5 of 79.1 GiB free" in text
    assert "Qwen-Image: all parts on the GPU (54 GiB of weights)" in text


@pytest.mark.parametrize(
    ("free", "placement"),
    [
        (78.5, "all parts on the GPU"),
        (47.0, "no options: the transformer stays on the GPU"),
        (30.0, "no options: the transformer stays on the GPU, the text encoder streams"),
        (23.4, "no options: what does not fit streams from 16 GiB of host memory. --vram N"),
        (7.6, "no options: what does not fit streams from 32 GiB of host memory."),
        (1.0, "does not fit: 1.0 GiB are free, 2 are needed at least"),
    ],
)
def test_recommendation_follows_the_free_memory(free: float, placement: str) -> None:
    answer = recommended([GPU | {"memory_free": free}], 100.0)
    assert answer["qwen_image"].startswith(placement)
    assert answer["dtype"] == "bfloat16"


def test_recommendation_follows_the_host_memory() -> None:
    def answer(host: float) -> str:
        return recommended([GPU | {"memory_free": 7.6}], host)["qwen_image"]

    assert answer(32.0).startswith("--weights fp8: what does not fit streams from 19 GiB of host memory")
    assert answer(16.0).startswith(
        "--weights fp8, slowly: streaming needs 19 GiB of host memory, here are 16"
    )


def test_recommendation_without_bfloat16_and_without_gpu() -> None:
    assert recommended([GPU | {"bfloat16": False}], 100.0)["dtype"].startswith("float16")
    assert "16, not enough" in recommended([], 16.0)["qwen_image"]
    assert "128, enough, but slow" in recommended([], 128.0)["qwen_image"]


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"qwenimage {__version__}\n"
    assert main([]) == 2
    assert "name a command: generate, train, lora, env" in capsys.readouterr().err
    assert main(["paint"]) == 2
    assert "invalid choice: 'paint'" in capsys.readouterr().err


def test_verbose_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a cat", "--init-image", "gone.png"]
    assert main(command) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--verbose", *command]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Where the error came from:\nTraceback")
    assert err.splitlines()[-1].startswith("qwenimage: error: gone.png does not exist")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from diffusers_qwenimage.cli import build_parser; build_parser().format_help(); "
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
