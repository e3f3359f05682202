"""`qwenimage lora inspect | convert | verify | diff`."""

import json
from pathlib import Path

import pytest
import torch
from lora_samples import samples
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.cli import main
from diffusers_qwenimage.cli.lora import OTHER_NAMES, TARGET_NAMES
from diffusers_qwenimage.lora.targets import ALIASES, TARGETS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file(samples()["musubi_lora"].tensors(), path, metadata={"ss_network_module": "x"})
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["lora", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_help_names_the_targets_of_the_library() -> None:
    assert TARGET_NAMES == tuple(TARGETS)
    assert OTHER_NAMES == tuple(ALIASES)


def test_inspect(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", source)
    assert code == 0 and err == "" and "kohya x 42" in out and "0.5 x 14" in out
    code, out, _ = run(capsys, "inspect", source, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["kinds"] == {"lora": 14} and facts["metadata"]["ss_network_module"] == "x"


def test_convert_verify_and_diff(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.safetensors"
    code, out, err = run(capsys, "convert", source, output, "--to", "portable", "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["exact"] and result["bound"] == 0.0
    assert result["target"] == "opensource" and result["actions"] == {"renamed": 14}
    assert run(capsys, "verify", source, output)[0] == 0
    tensors = load_file(output)
    tensors["transformer_blocks.0.img_mod.1.lora_up.weight"] += 0.01
    save_file(tensors, output)
    code, out, _ = run(capsys, "verify", source, output)
    assert code == 1 and "proved equal in 13 of 14 changes" in out
    code, out, _ = run(capsys, "diff", source, output)
    assert code == 1 and "transformer_blocks.0.img_mod.1" in out.splitlines()[0]
    code, out, _ = run(capsys, "diff", source, output, "--json")
    assert code == 1 and [m["module"] for m in json.loads(out)["modules"]] == [
        "transformer_blocks.0.img_mod.1"
    ]
    assert run(capsys, "verify", source, output, "--tolerance", "1")[0] == 0


def test_strict_and_approximate(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.safetensors"
    code, out, err = run(capsys, "convert", source, output, "--to", "diffsynth", "--strict")
    assert code == 2 and out == "" and err.count("\n") == 1 and "--strict" in err and not output.exists()
    save_file(samples()["musubi_lora"].tensors(alpha=0.3), source)
    code, out, err = run(capsys, "convert", source, output, "--to", "diffsynth")
    assert code == 2 and "--allow-approximate rounds it" in err and not output.exists()
    code, out, err = run(capsys, "convert", source, output, "--to", "diffsynth", "--allow-approximate")
    assert code == 0 and "14 approximated" in out and "relative difference at most" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "SOURCE", "SOURCE", "--to", "kohya"), "is the input"),
        (("convert", "SOURCE", "OUT", "--to", "nothing"), "invalid choice: 'nothing'"),
        (("convert", "SOURCE", "OUT", "--to", "original"), "no record of an original"),
        (("convert", "missing.safetensors", "OUT", "--to", "kohya"), "does not exist"),
        (("verify", "SOURCE", "missing.safetensors"), "does not exist"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"SOURCE": str(source), "OUT": str(tmp_path / "out.safetensors")}
    code, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors"]


def test_an_existing_output_survives_a_refusal(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    bad = samples()["musubi_lora"].tensors()
    bad["lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight"][0, 0] = torch.nan
    save_file(bad, source)
    code, _, err = run(capsys, "convert", source, output, "--to", "opensource")
    assert code == 2 and "holds NaN" in err
    assert output.read_bytes() == b"precious"
