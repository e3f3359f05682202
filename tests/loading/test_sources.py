"""Files from the disk, from Hugging Face and from ModelScope, when all goes well and when it does not."""

import hashlib
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import Fault, HubServer
from loading_fixtures import use_endpoint
from safetensors.torch import save

from diffusers_qwenimage.loading import DownloadError, Hub, find_files
from diffusers_qwenimage.loading.hubs import HUBS
from diffusers_qwenimage.loading.sources import matches

HUB_NAMES: tuple[Hub, ...] = ("huggingface", "modelscope")
MODEL = "Qwen/Qwen-Image"
SHARDS = [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
PATTERN = "transformer/diffusion_pytorch_model*.safetensors"
both_hubs = pytest.mark.parametrize("name", HUB_NAMES)
both_places = pytest.mark.parametrize("place", ["folder", "cache"])


def small_model(seed: int = 0) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(seed)
    shards = {name: save({name[-20:]: torch.randn(3000, generator=generator)}) for name in SHARDS}
    return {
        **shards,
        INDEX: json.dumps({"weight_map": {name[-20:]: Path(name).name for name in SHARDS}}).encode(),
        "transformer/config.json": b'{"_class_name": "QwenImageTransformer2DModel"}',
        "vae/diffusion_pytorch_model.safetensors": save({"v": torch.zeros(10)}),
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"",
        "README.md": b"Hello",
    }


@pytest.fixture
def served(hub: HubServer) -> HubServer:
    hub.repositories[MODEL] = small_model()
    return hub


def settings(place: str, tmp_path: Path) -> dict[str, Any]:
    return {"folder": tmp_path / "models"} if place == "folder" else {}


def contents(files: list[Path]) -> dict[str, bytes]:
    return {"/".join(file.parts[-2:]): file.read_bytes() for file in files}


@both_hubs
@both_places
def test_downloaded_once_then_found_without_a_request(
    name: Hub, place: str, served: HubServer, tmp_path: Path
) -> None:
    where = settings(place, tmp_path)
    files = find_files(MODEL, PATTERN, hub=name, **where)
    expected = {shard: served.repositories[MODEL][shard] for shard in SHARDS}
    assert contents(files) == expected
    assert (files[0].parent / "config.json").is_file(), "the config comes along"
    assert (files[0].parent / Path(INDEX).name).is_file(), "so does the index"
    assert not (files[0].parent.parent / "vae").exists()
    if place == "folder":
        assert files[0].is_relative_to(tmp_path / "models" / "Qwen" / "Qwen-Image")

    served.requests.clear()
    assert find_files(MODEL, PATTERN, hub=name, **where) == files
    assert find_files(MODEL, PATTERN, hub=name, local_only=True, **where) == files
    assert not served.requests
    served.stop()
    assert find_files(MODEL, PATTERN, hub=name, **where) == files


@both_hubs
@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ("vae/*.safetensors", ["vae/diffusion_pytorch_model.safetensors"]),
        ("tokenizer/", ["tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"]),
        ([SHARDS[1], SHARDS[0]], [SHARDS[1], SHARDS[0]]),
        (["vae/", "tokenizer/*.txt"], ["vae/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"]),
        (None, sorted(small_model())),
        ("", sorted(small_model())),
        ("./", sorted(small_model())),
    ],
)
def test_patterns(name: Hub, patterns: Any, found: list[str], served: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    files = find_files(MODEL, patterns, hub=name, folder=folder)
    assert [file.relative_to(folder / MODEL).as_posix() for file in files] == found


def test_a_star_does_not_cross_folders() -> None:
    assert matches("vae/a.safetensors", "vae/*.safetensors")
    assert not matches("vae/old/a.safetensors", "vae/*.safetensors")
    assert not matches("vae/a.safetensors", "*.safetensors")
    assert matches("vae/old/a.safetensors", "vae/")


@both_hubs
def test_a_pattern_without_a_match_names_what_there_is(name: Hub, served: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No file of Qwen/Qwen-Image on .* matches 'wrong/\*'.*README.md"):
        find_files(MODEL, ["vae/", "wrong/*"], hub=name, folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing was fetched"


@pytest.mark.parametrize("pattern", ["../x", "/etc/passwd", "vae\\x", "a/../../b"])
def test_patterns_that_leave_the_repository_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves the repository"):
        find_files(MODEL, pattern, folder=tmp_path)


@pytest.mark.parametrize("model_id", ["", "Qwen-Image", "a/b/c", "../x", "a/..", "https://x/y"])
def test_malformed_ids_are_refused(model_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither the id of a model"):
        find_files(model_id, PATTERN, folder=tmp_path)


@both_hubs
def test_without_downloading_missing_files_are_an_error(name: Hub, served: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Downloading is switched off"):
        find_files(MODEL, PATTERN, hub=name, folder=tmp_path, local_only=True)
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        find_files(MODEL, PATTERN, hub=name, local_only=True)
    assert not served.requests


@both_hubs
@both_places
@pytest.mark.parametrize("damage", ["truncated", "missing", "other bytes", "web page"])
def test_damaged_local_files_are_fetched_again(
    name: Hub, place: str, damage: str, served: HubServer, tmp_path: Path
) -> None:
    where = settings(place, tmp_path)
    files = find_files(MODEL, PATTERN, hub=name, **where)
    whole = files[1].read_bytes()
    target = files[1].resolve()
    if damage == "missing":
        files[1].unlink()
    else:
        wrong = {"truncated": whole[:-100], "other bytes": b"\0" * len(whole), "web page": b"<html>"}
        target.write_bytes(wrong[damage])
    with pytest.raises(FileNotFoundError, match="switched off"):
        find_files(MODEL, PATTERN, hub=name, local_only=True, **where)
    assert find_files(MODEL, PATTERN, hub=name, **where)[1].read_bytes() == whole
    assert len(served.asked_for(SHARDS[0])) == 1, "the whole file was not fetched again"


@both_hubs
def test_an_interrupted_tokenizer_is_completed(name: Hub, served: HubServer, tmp_path: Path) -> None:
    files = find_files(MODEL, "tokenizer/", hub=name, folder=tmp_path)
    (files[0].parent / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        find_files(MODEL, "tokenizer/", hub=name, folder=tmp_path, local_only=True)
    assert len(find_files(MODEL, "tokenizer/", hub=name, folder=tmp_path)) == 3


@both_hubs
@pytest.mark.parametrize("cut", [0, 1, 100, 11_000])
def test_a_cut_connection_is_resumed_or_repeated(
    name: Hub, cut: int, served: HubServer, tmp_path: Path
) -> None:
    served.faults[SHARDS[0]] = Fault(cut_after=cut, times=2)
    files = find_files(MODEL, PATTERN, hub=name, folder=tmp_path)
    assert contents(files)[SHARDS[0]] == served.repositories[MODEL][SHARDS[0]]


def test_modelscope_resumes_at_the_exact_byte(served: HubServer, tmp_path: Path) -> None:
    served.faults[SHARDS[0]] = Fault(cut_after=5000, times=1)
    find_files(MODEL, PATTERN, hub="modelscope", folder=tmp_path)
    ranges = [request.headers.get("range") for request in served.asked_for(SHARDS[0])]
    assert any(value and value.startswith("bytes=5000-") for value in ranges), ranges


@both_hubs
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=401), "login"),
        (Fault(status=403, error_code="GatedRepo"), "accept the model's terms"),
        (Fault(status=404, error_code="RepoNotFound"), "HTTP 404"),
        (Fault(status=429), "HTTP 429"),
        (Fault(status=500), "HTTP 500"),
        (Fault(status=503), "HTTP 503"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    name: Hub, fault: Fault, said: str, served: HubServer, tmp_path: Path
) -> None:
    served.faults["*"] = fault
    with pytest.raises(DownloadError, match=said) as caught:
        find_files(MODEL, PATTERN, hub=name, folder=tmp_path)
    assert MODEL in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


@both_hubs
def test_an_unknown_model_is_named(name: Hub, served: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"Qwen/None could not be fetched.*HTTP 404"):
        find_files("Qwen/None", PATTERN, hub=name, folder=tmp_path)


def test_without_a_network_hugging_face_gives_up_at_once(
    served: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served.stop()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(DownloadError, match="could not be fetched from Hugging Face"):
        find_files(MODEL, PATTERN, hub="huggingface", folder=tmp_path)
    assert not slept and capsys.readouterr().err == ""


def test_the_clients_offline_switch_is_named(
    served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(DownloadError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        find_files(MODEL, PATTERN, hub="huggingface", folder=tmp_path)
    assert not served.requests
    monkeypatch.undo()
    huggingface_hub.close_session()


@both_hubs
def test_a_server_that_is_gone_is_one_sentence(name: Hub, served: HubServer, tmp_path: Path) -> None:
    served.stop()
    with pytest.raises(DownloadError, match="could not be fetched.*Check the network") as caught:
        find_files(MODEL, PATTERN, hub=name, folder=tmp_path)
    assert "\n" not in str(caught.value)


@both_hubs
@pytest.mark.parametrize("problem", ["cut for good", "corrupted", "empty", "web page", "refused"])
def test_a_file_that_cannot_be_had_is_an_error(
    name: Hub, problem: str, served: HubServer, tmp_path: Path
) -> None:
    whole = served.repositories[MODEL][SHARDS[1]]
    served.faults[SHARDS[1]] = {
        "cut for good": Fault(cut_after=0),
        "corrupted": Fault(content=b"\0" * len(whole)),
        "empty": Fault(content=b""),
        "web page": Fault(content=b"<html>" + b" " * (len(whole) - 6)),
        "refused": Fault(status=403),
    }[problem]
    with pytest.raises(DownloadError) as caught:
        find_files(MODEL, PATTERN, hub=name, folder=tmp_path)
    assert "\n" not in str(caught.value)
    served.faults.clear()
    files = find_files(MODEL, PATTERN, hub=name, folder=tmp_path)
    assert contents(files)[SHARDS[1]] == whole


@both_hubs
def test_a_damaged_file_on_the_hub_itself_is_an_error(name: Hub, served: HubServer, tmp_path: Path) -> None:
    served.repositories[MODEL][SHARDS[1]] = served.repositories[MODEL][SHARDS[1]][:-7]
    with pytest.raises(DownloadError, match="truncated"):
        find_files(MODEL, PATTERN, hub=name, folder=tmp_path)


@both_hubs
def test_a_shard_of_the_set_absent_on_the_hub_is_named(name: Hub, served: HubServer, tmp_path: Path) -> None:
    del served.repositories[MODEL][SHARDS[1]]
    with pytest.raises(DownloadError, match="00002-of-00002"):
        find_files(MODEL, PATTERN, hub=name, folder=tmp_path)


def test_a_flipped_byte_is_found_by_its_hash(served: HubServer, tmp_path: Path) -> None:
    """Hugging Face's client checks the size alone; ModelScope's checks the hash itself."""
    whole = bytearray(served.repositories[MODEL][SHARDS[1]])
    whole[-1] ^= 1
    served.faults[SHARDS[1]] = Fault(content=bytes(whole))
    with pytest.raises(DownloadError, match="SHA-256"):
        find_files(MODEL, PATTERN, folder=tmp_path, check_hash=True)


@both_hubs
def test_a_redirect_is_followed_without_the_token(
    name: Hub, served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights usually lie on another host, which must not get the credentials."""
    use_endpoint(served.endpoint, tmp_path / "caches", monkeypatch, token="secret-token")
    other = HubServer(repositories=served.repositories)
    other.start()
    try:
        storage = other.endpoint.replace("127.0.0.1", "localhost")
        path = f"/{MODEL}/resolve/main/{SHARDS[0]}"
        served.faults[SHARDS[0]] = Fault(redirect=storage + path)
        files = find_files(MODEL, PATTERN, hub=name, folder=tmp_path)
        assert contents(files)[SHARDS[0]] == served.repositories[MODEL][SHARDS[0]]
        assert other.asked_for(SHARDS[0])
        assert any("secret-token" in str(request.headers) for request in served.requests)
        assert not any("secret-token" in str(request.headers) for request in other.requests)
    finally:
        other.stop()


def test_a_listing_that_points_out_of_the_repository_is_refused(served: HubServer, tmp_path: Path) -> None:
    served.repositories[MODEL]["../../outside.safetensors"] = b"x"
    with pytest.raises(DownloadError, match="lies outside of it"):
        find_files(MODEL, None, hub="modelscope", folder=tmp_path / "deep" / "er")
    assert not list(tmp_path.rglob("outside*"))


@both_hubs
def test_two_downloads_at_once_do_not_disturb_each_other(
    name: Hub, served: HubServer, tmp_path: Path
) -> None:
    results: list[dict[str, bytes]] = []

    def fetch() -> None:
        results.append(contents(find_files(MODEL, PATTERN, hub=name, folder=tmp_path)))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {shard: served.repositories[MODEL][shard] for shard in SHARDS}
    assert results == [expected, expected]


@both_hubs
def test_a_revision_is_asked_for_and_cached_apart(name: Hub, served: HubServer, tmp_path: Path) -> None:
    first = find_files(MODEL, "vae/", hub=name)
    served.requests.clear()
    commit = "2" * 40
    served.commits["v2"] = commit
    served.repositories[MODEL]["vae/diffusion_pytorch_model.safetensors"] = save({"v": torch.ones(10)})
    second = find_files(MODEL, "vae/", hub=name, revision="v2")
    assert any("v2" in request.path for request in served.requests)
    assert first[0].read_bytes() != second[0].read_bytes()
    served.stop()
    assert find_files(MODEL, "vae/", hub=name) == first
    assert find_files(MODEL, "vae/", hub=name, revision="v2") == second


def test_both_hubs_list_the_same(served: HubServer) -> None:
    listings = [{file.path: file for file in HUBS[name].list_files(MODEL, None)} for name in HUB_NAMES]
    assert listings[0].keys() == listings[1].keys() == served.repositories[MODEL].keys()
    digest = hashlib.sha256(served.repositories[MODEL][SHARDS[0]]).hexdigest()
    assert listings[0][SHARDS[0]] == listings[1][SHARDS[0]]
    assert listings[0][SHARDS[0]].sha256 == digest


def test_the_reason_for_a_request_is_logged(
    served: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="diffusers_qwenimage"):
        find_files(MODEL, "vae/", folder=tmp_path)
    assert "Fetching vae/ of Qwen/Qwen-Image from huggingface" in caplog.text
