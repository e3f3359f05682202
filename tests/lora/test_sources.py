"""Where a LoRA is: names, folders, hubs; and headers of remote files by range requests."""

from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from loading_fixtures import hub
from lora_made import MODULES, write_lora

from diffusers_qwenimage.loading import DownloadError
from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.read import read_header, read_lora
from diffusers_qwenimage.lora.sources import Access, RemoteLora, find_lora, parse_source, read_remote_header

__all__ = ["hub"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/lora", RemoteLora(hub="huggingface", model_id="me/lora")),
        (
            "hf:me/lora/a/b.safetensors",
            RemoteLora(hub="huggingface", model_id="me/lora", path="a/b.safetensors"),
        ),
        (
            "modelscope:me/lo.ra/b.safetensors@v1",
            RemoteLora(hub="modelscope", model_id="me/lo.ra", path="b.safetensors", revision="v1"),
        ),
        ("ms:me/lora@refs/pr/1", RemoteLora(hub="modelscope", model_id="me/lora", revision="refs/pr/1")),
    ],
)
def test_names(text: str, expected: RemoteLora) -> None:
    assert parse_source(text) == expected


@pytest.mark.parametrize("text", ["lora.safetensors", "./a/b", "/a/b", "~/a/b", "a/../b", "hf:only", "a b/c"])
def test_names_of_nothing(text: str) -> None:
    with pytest.raises(FileNotFoundError, match="nor the name of one on a hub"):
        parse_source(text)


def test_local_files_win_over_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me").mkdir()
    write_lora(tmp_path / "me" / "lora.safetensors")
    monkeypatch.chdir(tmp_path)
    assert parse_source("me/lora.safetensors") == Path("me/lora.safetensors")


@pytest.mark.parametrize("prefix", ["hf:", "modelscope:"])
def test_fetching(prefix: str, hub: HubServer, tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors")
    (tmp_path / "inner").mkdir()
    write_lora(tmp_path / "inner" / "b.safetensors", seed=1)
    hub.add_folder("me/lora", tmp_path)
    source = f"{prefix}me/lora"
    assert find_lora(f"{source}/a.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    found = find_lora(source, subfolder="inner", weight_name="b.safetensors")
    assert found.read_bytes() == (tmp_path / "inner" / "b.safetensors").read_bytes()
    assert find_lora(f"{source}/inner").name == "b.safetensors"
    with pytest.raises(ValueError, match=r"say which with weight_name: a\.safetensors, inner/b\.safetensors"):
        find_lora(source)
    with pytest.raises(ValueError, match="matches"):
        find_lora(source, weight_name="c.safetensors")
    before = len(hub.requests)
    assert find_lora(f"{source}/a.safetensors", local_files_only=True).is_file()
    assert len(hub.requests) == before
    hub.stop()
    assert find_lora(f"{source}/a.safetensors").is_file()  # what is cached needs no server


def test_settings_of_hugging_face(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write_lora(tmp_path / "served" / "a.safetensors")
    hub.add_folder("me/lora", tmp_path / "served")
    access = Access(token="hf_secret", cache_dir=tmp_path / "cache")
    found = find_lora("me/lora", access=access)
    assert found.is_relative_to(tmp_path / "cache") and read_lora(found).updates
    assert {request.headers.get("authorization") for request in hub.requests} == {"Bearer hf_secret"}
    before = len(hub.asked_for("a.safetensors"))
    find_lora("me/lora", access=replace(access, force_download=True))
    assert len(hub.asked_for("a.safetensors")) > before
    with pytest.raises(ValueError, match="Hugging Face alone"):
        find_lora("modelscope:me/lora/a.safetensors", access=access)


def test_a_peft_folder_comes_with_its_configuration(hub: HubServer, tmp_path: Path) -> None:
    convert_lora(write_lora(tmp_path / "a.safetensors"), tmp_path / "served", "peft")
    hub.add_folder("me/peft", tmp_path / "served")
    file = read_lora(find_lora("me/peft"))
    assert {update.scale.value for update in file.updates} == {0.5}
    assert file.updates[0].scale.source == "adapter_config"


@pytest.mark.parametrize("prefix", ["hf:", "modelscope:"])
def test_remote_headers(prefix: str, hub: HubServer, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", modules=MODULES[:2])
    hub.add_folder("me/lora", tmp_path)
    remote = parse_source(f"{prefix}me/lora")
    assert isinstance(remote, RemoteLora)
    name, header = read_remote_header(remote)
    assert name == "a.safetensors" and header == read_header(path)
    hub.faults["a.safetensors"] = Fault(content=path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="but its header describes"):
        read_remote_header(remote)
    huge = (1 << 60).to_bytes(8, "little") + b"{"
    hub.faults["a.safetensors"] = Fault(content=huge)
    with pytest.raises(ValueError, match="says it has a header of 1,152,921,504,606,846,976 bytes"):
        read_remote_header(remote)
    hub.faults["a.safetensors"] = Fault(status=403)
    with pytest.raises(DownloadError, match="HTTP 403"):
        read_remote_header(remote)
    assert str(remote) == f"{remote.hub}:me/lora"
