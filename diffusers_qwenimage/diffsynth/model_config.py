"""`ModelConfig`: where the files of a model are. It is never changed; `find` gives the files."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from diffusers_qwenimage.loading import Hub, find_files

HUB_NAMES: dict[str, Hub] = {"modelscope": "modelscope", "huggingface": "huggingface"}


@dataclass(frozen=True)
class ModelConfig:
    """Files of one model: on the disk (`path`), or of a model on a hub (`model_id`).

    Attributes:
        path: a .safetensors file, a list of files that make one model, or a folder.
        model_id: id on the hub, such as "Qwen/Qwen-Image".
        origin_file_pattern: which files of it: a path with wildcards, a folder ending in "/", or a list of
            these; None is the whole repository.
        download_source: "modelscope" (default) or "huggingface".
        download_resource: older name of `download_source` ("ModelScope", "HuggingFace").
        local_model_path: files are looked for in, and downloaded to, the folder `model_id` of this one;
            default "./models".
        skip_download: never make a request; the files must be there.
        offload_device: where the model waits while others work (see `enable_vram_management`).
        offload_dtype: type it waits in: torch.float8_e4m3fn (scaled per output channel) or the computed one.
    """

    path: str | Path | Sequence[str | Path] | None = None
    _: KW_ONLY
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    download_resource: str | None = None
    local_model_path: str | Path | None = None
    skip_download: bool = False
    offload_device: str | torch.device | None = None
    offload_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.model_id is None):
            raise ValueError(
                f"ModelConfig needs either `path` (files on the disk) or `model_id` (a model on a hub), got "
                f"path={self.path!r} and model_id={self.model_id!r}."
            )
        if self.path is not None and self.origin_file_pattern is not None:
            raise ValueError(
                "`origin_file_pattern` selects files of a `model_id`; with `path`, name the files."
            )
        if isinstance(self.path, Sequence) and not self.path:
            raise ValueError("`path` is empty; name at least one file.")
        _ = self.hub  # checks the name

    @property
    def hub(self) -> Hub:
        """The hub to download from.

        Raises:
            ValueError: if it is neither of the two, or both names of the setting are given and differ.
        """
        given = {name.lower() for name in (self.download_source, self.download_resource) if name is not None}
        name = given.pop() if given else "modelscope"
        if given or name not in HUB_NAMES:
            raise ValueError(
                f'download_source must be "modelscope" or "huggingface", got {self.download_source!r} (and '
                f"download_resource {self.download_resource!r})."
            )
        return HUB_NAMES[name]

    def find(self) -> list[list[Path]]:
        """The files, on the disk afterwards, grouped: each group is one checkpoint (or one other folder).

        Raises:
            FileNotFoundError: if a file is missing and is not to be downloaded.
            DownloadError: if the hub cannot deliver it.
            ValueError: if nothing on the hub matches.
        """
        if self.path is not None:
            paths = [self.path] if isinstance(self.path, str | Path) else list(self.path)
            return [[Path(path) for path in paths]]
        assert self.model_id is not None
        files = find_files(
            self.model_id,
            self.origin_file_pattern,
            hub=self.hub,
            folder="./models" if self.local_model_path is None else self.local_model_path,
            local_only=self.skip_download,
        )
        folders = dict.fromkeys(file.parent for file in files)
        return [[file for file in files if file.parent == folder] for folder in folders]
