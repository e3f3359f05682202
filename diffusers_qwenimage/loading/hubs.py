"""The two model hubs behind one small interface: what is cached, what there is, fetch it.

Every failure of a client (httpx, requests, the hubs' own exceptions, some of which are no `OSError`) becomes
a `DownloadError` of one sentence.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

Hub = Literal["huggingface", "modelscope"]

REACH_TIMEOUT = 5.0  # seconds for the first answer of a hub
STATUS_ADVICE = {
    401: "it asks for a login (HTTP 401): check the id, and log in if the model is private",
    403: "access is denied (HTTP 403): accept the model's terms on its page and log in",
    404: "there is no such model, revision or file (HTTP 404): check the id",
    429: "it limits requests (HTTP 429): wait a while and try again",
}


class DownloadError(OSError):
    """A model could not be fetched; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository: path within it, bytes, and SHA-256 where the hub states one."""

    path: str
    size: int
    sha256: str | None


class HubClient(Protocol):
    """What is asked of a hub.

    `model_id` is "owner/name"; `revision` a branch, tag or commit, None for the main branch. A transfer that
    fails raises `DownloadError`.
    """

    def cached(self, model_id: str, revision: str | None) -> Path | None:
        """The folder of the snapshot in the client's cache, if any; no request, perhaps not complete."""

    def list_files(self, model_id: str, revision: str | None) -> list[RemoteFile]:
        """All files of the repository, in all its folders; asks the hub."""

    def download(
        self,
        model_id: str,
        files: Sequence[RemoteFile],
        *,
        folder: Path | None,
        revision: str | None,
        again: bool,
    ) -> Path:
        """Fetch files into `folder` (None: the client's cache), also over existing ones if `again`.

        Returns the folder that holds them under their paths.
        """


class HuggingFace:
    """Hugging Face Hub, by huggingface_hub."""

    def cached(self, model_id: str, revision: str | None) -> Path | None:
        """See `HubClient`; finds the commit of a branch in the cache's `refs` folder."""
        from huggingface_hub import constants

        root = Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}"
        reference = root / "refs" / (revision or constants.DEFAULT_REVISION)
        commit = reference.read_text().strip() if reference.is_file() else revision
        snapshot = root / "snapshots" / commit if commit else None
        return snapshot if snapshot is not None and snapshot.is_dir() else None

    def list_files(self, model_id: str, revision: str | None) -> list[RemoteFile]:
        """See `HubClient`; the Hub states a SHA-256 for files in its large storage only."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with explained("Hugging Face", model_id):
            _reach_hugging_face()
            tree = list(HfApi().list_repo_tree(model_id, recursive=True, revision=revision))
        return [
            RemoteFile(
                path=_checked(entry.path, model_id),
                size=entry.size,
                sha256=entry.lfs.sha256 if entry.lfs else None,
            )
            for entry in tree
            if isinstance(entry, RepoFile)
        ]

    def download(
        self,
        model_id: str,
        files: Sequence[RemoteFile],
        *,
        folder: Path | None,
        revision: str | None,
        again: bool,
    ) -> Path:
        """See `HubClient`."""
        from huggingface_hub import snapshot_download

        with explained("Hugging Face", model_id):
            _reach_hugging_face()
            path = snapshot_download(
                model_id,
                revision=revision,
                local_dir=folder,
                allow_patterns=[file.path for file in files],
                force_download=again,
            )
        return Path(path)


class ModelScope:
    """ModelScope, by modelscope_hub."""

    def cached(self, model_id: str, revision: str | None) -> Path | None:
        """See `HubClient`."""
        from modelscope_hub import HubApi
        from modelscope_hub.errors import CacheError

        try:
            return HubApi().download_repo(model_id, "model", revision=revision, local_files_only=True)
        except CacheError:
            return None

    def list_files(self, model_id: str, revision: str | None) -> list[RemoteFile]:
        """See `HubClient`."""
        from modelscope_hub import HubApi

        with explained("ModelScope", model_id):
            entries = HubApi().list_repo_files(model_id, "model", revision=revision)
        return [
            RemoteFile(path=_checked(entry.path, model_id), size=entry.size, sha256=entry.sha256)
            for entry in entries
            if not entry.is_dir
        ]

    def download(
        self,
        model_id: str,
        files: Sequence[RemoteFile],
        *,
        folder: Path | None,
        revision: str | None,
        again: bool,
    ) -> Path:
        """See `HubClient`."""
        from modelscope_hub import HubApi

        # `again` needs nothing here: the client compares existing files with the hub's SHA-256.
        with explained("ModelScope", model_id):
            return HubApi().download_repo(
                model_id,
                "model",
                revision=revision,
                local_dir=folder,
                allow_patterns=[file.path for file in files],
            )


HUBS: dict[Hub, HubClient] = {"huggingface": HuggingFace(), "modelscope": ModelScope()}


def _checked(path: str, model_id: str) -> str:
    """A path from a listing; it must stay within the repository."""
    if path.startswith("/") or "\\" in path or ".." in path.split("/"):
        raise DownloadError(
            f"{model_id} lists the file {path!r}, which lies outside of it; nothing was fetched."
        )
    return path


def _reach_hugging_face() -> None:
    """Raise the client's connection error at once if the Hub cannot be reached, or is not to be.

    The client itself tries six times over 25 seconds, and warns each time.
    """
    from huggingface_hub import constants, get_session

    get_session().request("HEAD", constants.ENDPOINT, timeout=REACH_TIMEOUT)


@contextmanager
def explained(hub: str, model_id: str) -> Iterator[None]:
    """Turn whatever a hub's client raises for a failed transfer into a `DownloadError`."""
    try:
        yield
    except DownloadError:
        raise
    except _client_errors() as error:
        raise DownloadError(f"{model_id} could not be fetched from {hub}: {_reason(error)}.") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """Everything the clients raise for a failed transfer. Programming errors are not among it."""
    from huggingface_hub import errors
    from modelscope_hub.errors import HubError

    names = ("EntryNotFoundError", "RevisionResolutionError", "XetDownloadError")
    found = [getattr(errors, name) for name in names if hasattr(errors, name)]
    for package in ("httpx", "httpx2"):  # huggingface_hub 1 uses the one, 2 the other
        if importlib.util.find_spec(package):
            found.append(import_module(package).HTTPError)
    return (OSError, HubError, *found)


def _reason(error: BaseException) -> str:
    """One line: advice for a known HTTP status, else the client's message and what lies behind it."""
    failed = getattr(error, "failed_files", None)
    if failed:  # ModelScope's error of several files
        name, cause = next(iter(failed.items()))
        return f"{name}: {_reason(cause)}"
    chain = _chain(error)
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain):
        return "it is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or give local files"
    status = next((status for link in chain if (status := _status(link))), None)
    if status in STATUS_ADVICE:
        return STATUS_ADVICE[status]
    if status is not None and status >= 500:
        return f"the server fails (HTTP {status}): try again later"
    # The outermost message tells the file, the innermost the cause; some outer ones quote whole tracebacks.
    texts = [_first_line(link) for link in (chain[0], chain[-1])]
    said = " / ".join(dict.fromkeys(text for text in texts if len(text) <= 300)) or texts[-1][:300]
    return f"{said}. Check the network and try again, or give local files"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, innermost last."""
    links = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) is not None and link not in links:
        links.append(link)
    return links


def _status(error: BaseException) -> int | None:
    """HTTP status of an error, under the names that the clients use."""
    response = getattr(error, "response", None)
    found = getattr(response, "status_code", None) or getattr(error, "status_code", None)
    return found if isinstance(found, int) else None


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    chinese = any("\u3400" <= letter <= "\u9fff" for letter in text)
    return type(error).__name__ if chinese else text
