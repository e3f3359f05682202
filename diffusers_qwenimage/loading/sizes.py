"""How large a model is, before it is loaded or even downloaded."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusers_qwenimage.checkpoint import open_checkpoint
from diffusers_qwenimage.checkpoint.reader import DTYPES
from diffusers_qwenimage.files import DTYPE_BITS

from .components import MODELSCOPE_PREFIX, WEIGHT_FOLDERS, check_index
from .hubs import HUBS, Hub
from .sources import check_id

STORED_BYTES = 2  # per weight on the hubs: bf16


def weight_sizes(
    source: str | Path, dtype: torch.dtype, *, hub: Hub = "huggingface", revision: str | None = None
) -> dict[str, int]:
    """Bytes of each component's weights once they are loaded as `dtype`; of a hub's model from its listing.

    Raises:
        FileNotFoundError: if files are missing.
        DownloadError: if a hub has to be asked and cannot be.
        ValueError: if a file is damaged, or the source is no Qwen-Image model.
    """
    folder = Path(source)
    if folder.is_dir():
        check_index(folder)
        return {name: _on_disk(folder / name, dtype) for name in WEIGHT_FOLDERS}
    model_id = str(source)
    if model_id.startswith(MODELSCOPE_PREFIX):
        model_id, hub = model_id.removeprefix(MODELSCOPE_PREFIX), "modelscope"
    check_id(model_id)
    cached = HUBS[hub].cached(model_id, revision)
    if cached is not None and all((cached / name).is_dir() for name in WEIGHT_FOLDERS):
        return weight_sizes(cached, dtype)
    sizes = dict.fromkeys(WEIGHT_FOLDERS, 0)
    for file in HUBS[hub].list_files(model_id, revision):
        name = file.path.partition("/")[0]
        if name in sizes and file.path.endswith(".safetensors"):
            sizes[name] += file.size * dtype.itemsize // STORED_BYTES
    return sizes


def describe_sizes(sizes: dict[str, int]) -> str:
    """ "53.7 GiB of weights (transformer 38.1, text encoder 15.4, vae 0.2)"."""
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.1f}" for name, size in _largest_first(sizes))
    return f"{sum(sizes.values()) / 2**30:.1f} GiB of weights ({parts})"


def _on_disk(folder: Path, dtype: torch.dtype) -> int:
    total = 0
    for tensor in open_checkpoint(folder).tensors.values():
        entry = tensor.entry
        stored = entry.end - entry.start
        floating = entry.dtype in DTYPES and DTYPES[entry.dtype].is_floating_point
        total += stored * 8 * dtype.itemsize // DTYPE_BITS[entry.dtype] if floating else stored
    return total


def _largest_first(sizes: dict[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])
