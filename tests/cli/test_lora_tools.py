"""`qwenimage lora inspect | merge | resize | extract | bake | doctor`: output, exit codes, remote files."""

import json
from pathlib import Path

import pytest
import torch
from components import transformers
from hub_server import Fault, HubServer
from loading_fixtures import hub
from lora_made import MODULES, lora_tensors, write_lora
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.cli import main

__all__ = ["hub"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["lora", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", "comfyui", alpha=2.0)
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    assert "comfyui x 30" in out and "hidden width 48, not the published one" in out
    assert "diffusers 0.42.1" in out and "loads at 2 times the strength -> convert --to opensource" in out
    code, out, _ = run(capsys, "inspect", path, "--json")
    data = json.loads(out)
    verdicts = {entry["consumer"]: entry["verdict"] for entry in data["consumers"]}
    assert verdicts["InvokeAI 2026-08"] == "unrecognised" and verdicts["ComfyUI 0.3.64"] == "exact"
    assert data["scale_sources"] == {"key": 10} and data["num_updates"] == 10


@pytest.mark.parametrize(
    "spec", ["me/lora/style.safetensors", "modelscope:me/lora/style.safetensors", "hf:me/lora"]
)
def test_inspect_fetches_the_header_alone(
    spec: str, hub: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    modules = tuple(f"transformer_blocks.{index}.attn.to_q" for index in range(400))
    write_lora(tmp_path / "style.safetensors", "diffsynth", alpha=None, rank=16, modules=modules)
    hub.add_folder("me/lora", tmp_path)
    size = (tmp_path / "style.safetensors").stat().st_size
    code, out, err = run(capsys, "inspect", spec, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["num_updates"] == 400 and data["ranks"] == {"16": 400}
    assert data["name"].endswith("me/lora/style.safetensors")
    ranges = [request.headers.get("range") for request in hub.asked_for("style.safetensors")]
    # The header has about 95 kB: the first 64 kB, then its rest; of the 2.4 MB of factors, nothing more.
    assert ranges[0] == "bytes=0-65535" and len(ranges) == 2
    assert int(str(ranges[1]).rpartition("-")[2]) < 200_000 < size


def test_inspect_of_remote_files_that_are_not_there(
    hub: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_lora(tmp_path / "a.safetensors")
    write_lora(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"<html>not weights, but long enough</html>")
    hub.add_folder("me/lora", tmp_path)
    for source, said in (
        ("me/none/a.safetensors", "HTTP 404"),
        ("me/lora/d.safetensors", "HTTP 404"),
        ("me/lora", "several files"),
        ("me/lora/c.safetensors", "not a safetensors file"),
        ("no such file", "is not a file or folder here"),
    ):
        code, out, err = run(capsys, "inspect", source)
        assert code == 2 and said in err and not out and err.count("\n") == 1
    hub.faults["a.safetensors"] = Fault(status=503)
    assert "HTTP 503" in run(capsys, "inspect", "modelscope:me/lora/a.safetensors")[2]


def test_inspect_of_a_damaged_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_file({**lora_tensors(), "what.is.this": torch.ones(1)}, tmp_path / "a.safetensors")
    code, out, _ = run(capsys, "inspect", tmp_path / "a.safetensors")
    assert code == 2 and "unknown key 'what.is.this'" in out


def test_merge(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = write_lora(tmp_path / "a.safetensors")
    second = write_lora(tmp_path / "b.safetensors", seed=1)
    output = tmp_path / "out.safetensors"
    code, out, _ = run(capsys, "merge", f"{first}=0.5", second, output, "--to", "kohya")
    assert code == 0 and "2 files merged" in out and "proved bit by bit" in out
    assert all(key.startswith("lora_unet_") for key in load_file(output))
    code, _, err = run(capsys, "merge", f"{first}=much", output)
    assert code == 2 and "'much'" in err


def test_resize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", rank=8)
    output = tmp_path / "out.safetensors"
    code, out, _ = run(capsys, "resize", source, output, "--rank", 2, "--json")
    data = json.loads(out)
    assert code == 0 and 0 < data["relative_error"] < 1 and len(data["modules"]) == len(MODULES)
    assert {module["new_rank"] for module in data["modules"]} == {2}
    code, _, err = run(capsys, "resize", source, tmp_path / "other.safetensors")
    assert code == 2 and "Say what rank is wanted" in err and not (tmp_path / "other.safetensors").exists()


def test_extract_and_bake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base, lora = tmp_path / "base.safetensors", write_lora(tmp_path / "a.safetensors")
    save_file({key: value.clone() for key, value in transformers()[1].state_dict().items()}, base)
    tuned, output = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    code, out, _ = run(capsys, "bake", base, f"{lora}=1.0", tuned)
    assert code == 0 and f"{len(MODULES)} of " in out
    code, out, _ = run(capsys, "extract", base, tuned, output, "--rank", 4, "--dtype", "float32")
    assert code == 0 and f"{len(MODULES)} modules extracted" in out
    # What comes back differs by the rounding of base + change to fp32.
    assert main(["lora", "verify", str(lora), str(output), "--tolerance", "1e-5"]) == 0


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    healthy = write_lora(tmp_path / "a.safetensors")
    damaged = write_lora(tmp_path / "b.safetensors", "diffsynth-pipe")
    output = tmp_path / "out.safetensors"
    assert run(capsys, "doctor", healthy)[:2] == (0, "no known damage\n")
    code, out, _ = run(capsys, "doctor", damaged)
    assert code == 1 and "can be repaired: " in out and "pipe.dit." in out
    code, out, _ = run(capsys, "doctor", damaged, output, "--to", "diffusers")
    assert code == 0 and "repaired: " in out
    assert main(["lora", "verify", str(healthy), str(output)]) == 0
    save_file({"x.y": torch.ones(1)}, tmp_path / "c.safetensors")
    code, _, err = run(capsys, "doctor", tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    assert code == 2 and "cannot be repaired" in err
