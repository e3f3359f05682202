"""Where a LoRA comes from: a local file or folder, or a file on Hugging Face or ModelScope.

    style.safetensors      folder/        ORG/NAME        ORG/NAME/style.safetensors
    hf:ORG/NAME/style.safetensors         modelscope:ORG/NAME/style.safetensors@v1

A remote file can be looked into without fetching it: its header is read by HTTP range requests.
"""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from diffusers_qwenimage.files import MAX_HEADER_BYTES, SafetensorsHeader, parse_header
from diffusers_qwenimage.loading import DownloadError, Hub, find_files
from diffusers_qwenimage.loading.hubs import HUBS, explained
from diffusers_qwenimage.lora.read import ADAPTER_CONFIG, ADAPTER_MODEL

FIRST_BYTES = 1 << 16  # of the first range request; the header of a LoRA of 60 blocks has about 250 kB
TIMEOUT = 30.0  # seconds for one range request
HUB_PREFIXES: dict[str, Hub] = {
    "hf:": "huggingface",
    "huggingface:": "huggingface",
    "ms:": "modelscope",
    "modelscope:": "modelscope",
}
_SPEC = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
# What the files are called that tools save by default; the first that exists is taken.
USUAL_NAMES = ("pytorch_lora_weights.safetensors", ADAPTER_MODEL)


@dataclass(frozen=True, kw_only=True)
class RemoteLora:
    """A file on a hub; `path` None means that it has to be chosen among the files of the repository."""

    hub: Hub
    model_id: str
    path: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}:{self.model_id}{path}{revision}"


@dataclass(frozen=True, kw_only=True)
class Access:
    """How Hugging Face is asked, where it differs from the client's settings.

    Attributes:
        token: of a private repository; None is the stored one, False none.
        cache_dir: where to keep files; None is the client's cache.
        force_download: fetch again what is cached.
    """

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False


def parse_source(source: str | Path, *, hub: Hub = "huggingface") -> Path | RemoteLora:
    """A local path if there is such a file or folder, else a file on a hub.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if isinstance(source, Path) or Path(source).exists():
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        return path
    prefix = next((prefix for prefix in HUB_PREFIXES if source.startswith(prefix)), "")
    match = _SPEC.fullmatch(source.removeprefix(prefix))
    if match is None or source.startswith((".", "/", "~")) or ".." in source:
        raise FileNotFoundError(
            f"{source} is not a file or folder here, nor the name of one on a hub (ORG/NAME, "
            "ORG/NAME/FILE.safetensors, modelscope:ORG/NAME/FILE.safetensors)."
        )
    return RemoteLora(
        hub=HUB_PREFIXES.get(prefix, hub),
        model_id=match["id"],
        path=match["path"],
        revision=match["revision"],
    )


def find_lora(
    source: str | Path,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    hub: Hub = "huggingface",
    local_files_only: bool = False,
    access: Access | None = None,
) -> Path:
    """The local path of a LoRA file (a PEFT folder for adapter_model.safetensors), fetched if need be.

    Args:
        source: see the top of this file.
        weight_name: the file in the folder or repository; needed only where there are several.
        subfolder: the folder in the folder or repository.
        access: for Hugging Face, where it differs from the client's settings.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there are several and none is named.
        DownloadError: if a hub refuses or cannot be reached.
    """
    place = parse_source(source, hub=hub)
    if isinstance(place, RemoteLora):
        wanted = replace(
            place, path=_join(place.path, subfolder, weight_name), revision=revision or place.revision
        )
        return _fetch(wanted, local_files_only, access or Access())
    if place.is_file():
        return place
    folder = place / subfolder if subfolder else place
    if weight_name is None:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        weight_name = choose_file(names, str(folder))
    path = folder / weight_name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    return path


def read_remote_header(remote: RemoteLora) -> tuple[str, SafetensorsHeader]:
    """(path in the repository, header) of a remote file, by range requests; nothing else is fetched.

    Raises:
        ValueError: if the file is not safetensors or contradicts itself.
        DownloadError: if the hub refuses or cannot be reached.
    """
    path = remote.path
    if path is None or not path.endswith(".safetensors"):
        names = [file.path for file in HUBS[remote.hub].list_files(remote.model_id, remote.revision)]
        inside = [name for name in names if path is None or name.startswith(f"{path}/")]
        path = choose_file([name for name in inside if name.endswith(".safetensors")], str(remote))
    read = _range_reader(remote, path)
    with explained(remote.hub, remote.model_id):
        start, size = read(0, FIRST_BYTES)
        return path, _parse(start, size, f"{remote.model_id}/{path}", lambda first, end: read(first, end)[0])


def choose_file(names: Sequence[str], place: str) -> str:
    """The LoRA file among the .safetensors files of a place.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be told which one is meant.
    """
    for usual in USUAL_NAMES:
        found = [name for name in names if name.split("/")[-1] == usual]
        if len(found) == 1:
            return found[0]
    if not names:
        raise FileNotFoundError(f"{place} holds no .safetensors file.")
    if len(names) > 1:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(f"{place} holds several files; say which with weight_name: {shown}.")
    return names[0]


def _fetch(remote: RemoteLora, local_only: bool, access: Access) -> Path:
    path = remote.path
    if path is None or not path.endswith(".safetensors"):
        path = choose_file(_names(remote, local_only, access), str(remote))
    paths = [path]
    if path.split("/")[-1] == ADAPTER_MODEL:
        paths.append(path.removesuffix(ADAPTER_MODEL) + ADAPTER_CONFIG)
    if access == Access():
        revision = remote.revision
        found = find_files(remote.model_id, paths, hub=remote.hub, local_only=local_only, revision=revision)
        return found[0]
    if remote.hub != "huggingface":
        raise ValueError("token, cache_dir and force_download are settings of Hugging Face alone.")
    from huggingface_hub import hf_hub_download

    with explained("Hugging Face", remote.model_id):
        fetched = [
            hf_hub_download(
                remote.model_id,
                name,
                revision=remote.revision,
                cache_dir=access.cache_dir,
                force_download=access.force_download,
                token=access.token,
                local_files_only=local_only,
            )
            for name in paths
        ]
    return Path(fetched[0])


def _names(remote: RemoteLora, local_only: bool, access: Access) -> list[str]:
    """The .safetensors files of a repository, from the hub, or from the cache if it must not be asked."""
    if local_only:
        root = HUBS[remote.hub].cached(remote.model_id, remote.revision)
        found = sorted(root.rglob("*.safetensors")) if root else []
        names = [file.relative_to(root).as_posix() for file in found] if root else []
    elif access.token is not None and remote.hub == "huggingface":
        from huggingface_hub import HfApi

        with explained("Hugging Face", remote.model_id):
            api = HfApi(token=access.token)
            names = api.list_repo_files(remote.model_id, revision=remote.revision)
    else:
        names = [file.path for file in HUBS[remote.hub].list_files(remote.model_id, remote.revision)]
    inside = f"{remote.path}/" if remote.path else ""
    return [name for name in names if name.endswith(".safetensors") and name.startswith(inside)]


def _join(*parts: str | None) -> str | None:
    return "/".join(part for part in parts if part) or None


def _parse(start: bytes, size: int, name: str, read: Callable[[int, int], bytes]) -> SafetensorsHeader:
    if len(start) < 9 or start[8:9] != b"{":
        raise ValueError(f"{name} is not a safetensors file.")
    length: int = struct.unpack("<Q", start[:8])[0]
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise ValueError(f"{name} says it has a header of {length:,} bytes in a file of {size:,}.")
    content = start[8 : 8 + length]
    if len(content) < length:
        content += read(8 + len(content), 8 + length)
    header = parse_header(content, name)
    if header.file_size != size:
        raise ValueError(f"{name} has {size:,} bytes, but its header describes {header.file_size:,}.")
    return header


def _range_reader(remote: RemoteLora, path: str) -> Callable[[int, int], tuple[bytes, int]]:
    """A function of (first, end) that gives those bytes of a remote file, and the size of the file."""
    get = _hugging_face(remote, path) if remote.hub == "huggingface" else _modelscope(remote, path)

    def read(first: int, end: int) -> tuple[bytes, int]:
        content, content_range = get(f"bytes={first}-{end - 1}")
        total = content_range.rpartition("/")[2]
        if not total.isdigit():
            raise DownloadError(f"{remote} is served without ranges; fetch the file and look into it here.")
        return content, int(total)

    return read


def _hugging_face(remote: RemoteLora, path: str) -> Callable[[str], tuple[bytes, str]]:
    from huggingface_hub import hf_hub_url

    utils: Any = import_module("huggingface_hub.utils")  # its types do not export these names
    url = hf_hub_url(remote.model_id, path, revision=remote.revision)

    def get(wanted: str) -> tuple[bytes, str]:
        headers = {**utils.build_hf_headers(), "Range": wanted}
        with utils.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            utils.hf_raise_for_status(response)
            content_range = response.headers.get("Content-Range", "")
            return (response.read() if content_range else b""), content_range

    return get


def _modelscope(remote: RemoteLora, path: str) -> Callable[[str], tuple[bytes, str]]:
    import requests
    from modelscope_hub.config import get_default_config

    config = get_default_config()
    query = urlencode({"Revision": remote.revision or "master", "FilePath": path})
    url = f"{config.endpoint}/api/v1/models/{remote.model_id}/repo?{query}"

    def get(wanted: str) -> tuple[bytes, str]:
        headers = {"Range": wanted, **({"Authorization": f"Bearer {config.token}"} if config.token else {})}
        with requests.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
            response.raise_for_status()
            content_range = response.headers.get("Content-Range", "")
            return (response.content if content_range else b""), content_range

    return get
