"""Files of a model: those on the disk first, then from Hugging Face or ModelScope.

No request is made when the files are there and complete. A file counts as complete when its safetensors
header fits its size, all shards of a numbered set are present, JSON can be parsed, and a tokenizer has its
vocabulary. Downloads are done by the hubs' own clients: they resume, show progress, honour their usual
settings (tokens, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `MODELSCOPE_ENDPOINT`, ...) and write a file under its name
when it is whole.
"""

import fnmatch
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock

from diffusers_qwenimage.checkpoint import shard_problem
from diffusers_qwenimage.files import read_header

from .hubs import HUBS, DownloadError, Hub, RemoteFile

logger = logging.getLogger(__name__)

MODEL_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # "./models" and "../models" are paths
# Small files that say what the weights beside them are; fetched along.
SIDECARS = ("config.json", "*.safetensors.index.json")


def find_files(
    model_id: str,
    patterns: str | Sequence[str] | None = None,
    *,
    hub: Hub = "huggingface",
    folder: str | Path | None = None,
    local_only: bool = False,
    revision: str | None = None,
    check_hash: bool = False,
) -> list[Path]:
    """Files of the model `model_id` ("ORG/NAME") that match, downloaded where they are not on the disk.

    Args:
        patterns: one or several of: a path with wildcards within a folder (`transformer/*.safetensors`), or a
            folder ending in "/", meaning all that is in it. None, "" and "./" mean the whole repository.
        folder: look in and download to `folder/ORG/NAME`; None means the hub client's cache.
        local_only: never make a request.
        revision: branch, tag or commit; None is the hub's main branch. Not compared with files in `folder`.
        check_hash: compare the SHA-256 of downloaded weights with the hub's.

    Raises:
        FileNotFoundError: with `local_only`, if files are missing or incomplete.
        DownloadError: if the hub refuses, cannot be reached, or delivers a damaged file.
        ValueError: if `model_id` or a pattern is malformed, or a pattern matches nothing on the hub.
    """
    check_id(model_id)
    wanted = _patterns(patterns)
    local, problem = _look(model_id, wanted, hub, folder, revision)
    if local is not None and problem is None:
        return _matching(local, wanted)
    if local_only:
        where = f"in {local}" if local else f"of {model_id}"
        raise FileNotFoundError(
            f"The files {', '.join(wanted)} {where} cannot be used: {problem}. Downloading is switched off; "
            "fetch them by hand or allow it."
        )
    with _one_at_a_time(model_id, folder):
        local, problem = _look(model_id, wanted, hub, folder, revision)  # another process may be done by now
        if local is None or problem is not None:
            logger.info("Fetching %s of %s from %s: %s.", ", ".join(wanted), model_id, hub, problem)
            needed = _select(HUBS[hub].list_files(model_id, revision), wanted, model_id, hub)
            target = local if folder is not None else None
            local = _fetch(model_id, needed, hub=hub, local=target, revision=revision)
            _verify(local, needed, model_id, check_hash=check_hash)
    problem = _problem(local, wanted)
    if problem:
        raise DownloadError(f"{model_id} as {hub} serves it cannot be used: {problem}.")
    return _matching(local, wanted)


def file_problem(path: Path) -> str | None:
    """Say in a few words why a file is not complete, or None."""
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except ValueError as error:
            return str(error).rstrip(".")
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            return f"{path} is not complete JSON"
    return None


def matches(path: str, pattern: str) -> bool:
    """Whether a path within a repository fits a pattern of `find_files`. `*` does not cross a "/"."""
    if pattern.endswith("/"):
        return path.startswith(pattern)
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def check_id(model_id: str) -> None:
    """Refuse what is no "ORGANISATION/NAME"."""
    if not MODEL_ID.fullmatch(model_id) or ".." in model_id:
        raise ValueError(
            f"{model_id!r} is neither the id of a model (ORGANISATION/NAME) nor the path of a file or folder "
            "that exists."
        )


def _patterns(patterns: str | Sequence[str] | None) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) or patterns is None else list(patterns)
    cleaned = []
    for pattern in listed:
        name = (pattern or "").removeprefix("./")
        if "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(
                f"The pattern {pattern!r} leaves the repository; use paths such as 'vae/*.json'."
            )
        cleaned.append(name or "/")
    if not cleaned:
        raise ValueError("No file pattern was given; name files such as 'transformer/*.safetensors'.")
    return cleaned


def _look(
    model_id: str, patterns: Sequence[str], hub: Hub, folder: str | Path | None, revision: str | None
) -> tuple[Path | None, str | None]:
    """The folder where the files are or will be, and why they are not complete (None if they are)."""
    local = Path(folder) / model_id if folder is not None else HUBS[hub].cached(model_id, revision)
    return local, "it is not in the cache" if local is None else _problem(local, patterns)


@contextmanager
def _one_at_a_time(model_id: str, folder: str | Path | None) -> Iterator[None]:
    """Keep processes that download to the same folder apart; the clients' caches have locks of their own.

    huggingface_hub removes a file in a plain folder before it writes it again.
    """
    if folder is None:
        yield
        return
    locks = Path(folder) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{model_id.replace('/', '--')}.lock"):
        yield


def _fits(path: str, pattern: str) -> bool:
    return pattern == "/" or matches(path, pattern)


def _local_names(folder: Path) -> list[str]:
    """Paths within `folder`, without hidden files and folders (the clients keep their notes there)."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    names = _local_names(folder)
    found = [name for pattern in patterns for name in names if _fits(name, pattern)]
    return [folder / name for name in dict.fromkeys(found)]


def _problem(folder: Path, patterns: Sequence[str]) -> str | None:
    """Why the files in `folder` are not all there, or None."""
    for pattern in patterns:
        if not _matching(folder, [pattern]):
            return f"nothing in {folder} matches {pattern!r}"
    files = _matching(folder, patterns)
    damaged = next((text for text in map(file_problem, files) if text), None)
    return damaged or _shards(files) or _tokenizer(files)


def _shards(files: Sequence[Path]) -> str | None:
    problem = shard_problem(files)
    return problem.rstrip(".") if problem else None


def _tokenizer(files: Sequence[Path]) -> str | None:
    names = {file.parent: {other.name for other in files if other.parent == file.parent} for file in files}
    for folder, present in names.items():
        complete = "tokenizer.json" in present or {"vocab.json", "merges.txt"} <= present
        if "tokenizer_config.json" in present and not complete:
            return f"{folder} has no tokenizer.json, nor vocab.json with merges.txt"
    return None


def _select(
    listing: Sequence[RemoteFile], patterns: Sequence[str], model_id: str, hub: str
) -> list[RemoteFile]:
    """What to fetch: the files that match, and the configs and indices beside weights."""
    names = [file.path for file in listing]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            shown = ", ".join(sorted(names)[:8]) or "nothing"
            raise ValueError(
                f"No file of {model_id} on {hub} matches {pattern!r}. The repository holds {shown}"
                f"{', ...' if len(names) > 8 else ''}."
            )
    chosen = {name for name in names if any(_fits(name, pattern) for pattern in patterns)}
    folders = {PurePosixPath(name).parent for name in chosen if name.endswith(".safetensors")}
    chosen |= {name for name in names if PurePosixPath(name).parent in folders and _is_sidecar(name)}
    return [file for file in listing if file.path in chosen]


def _is_sidecar(name: str) -> bool:
    return any(fnmatch.fnmatchcase(PurePosixPath(name).name, pattern) for pattern in SIDECARS)


def _fetch(
    model_id: str, files: Sequence[RemoteFile], *, hub: Hub, local: Path | None, revision: str | None
) -> Path:
    """Download what is not there yet or not whole; returns the folder of the snapshot."""
    client = HUBS[hub]
    root = local if local is not None else client.cached(model_id, revision)
    missing, broken = [], []
    for file in files:
        path = root / file.path if root is not None else None
        if path is None or not path.is_file():
            missing.append(file)
        elif path.stat().st_size != file.size or file_problem(path):
            broken.append(file)
    if broken:
        root = client.download(model_id, broken, folder=local, revision=revision, again=True)
    if missing or not broken:
        root = client.download(model_id, missing or files, folder=local, revision=revision, again=False)
    assert root is not None  # something was downloaded
    return local if local is not None else root


def _verify(folder: Path, files: Iterable[RemoteFile], model_id: str, *, check_hash: bool) -> None:
    for file in files:
        path = folder / file.path
        if not path.is_file():
            raise DownloadError(f"{file.path} of {model_id} did not arrive. Try again.")
        if path.stat().st_size != file.size:
            raise DownloadError(
                f"{path} has {path.stat().st_size:,} bytes, the hub says {file.size:,}; the download is cut. "
                "Try again."
            )
        if check_hash and file.sha256 and file.sha256 != sha256(path):
            raise DownloadError(f"{path} has not the SHA-256 the hub states. Remove it and try again.")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
