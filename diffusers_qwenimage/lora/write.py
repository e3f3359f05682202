"""Writing safetensors one tensor at a time: memory holds the largest tensor, not the file.

The layout is that of the safetensors library (types of large elements first, then by name), so a file that
this module writes has the same bytes as one that the library writes from the same tensors.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from diffusers_qwenimage.lora.read import TORCH_DTYPES
from diffusers_qwenimage.lora.updates import StoredTensor, load_finite

Progress = Callable[[int], None]  # called with the number of bytes done since the last call
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def stream_safetensors(
    path: Path,
    tensors: Sequence[StoredTensor],
    metadata: Mapping[str, str],
    *,
    progress: Progress | None = None,
) -> None:
    """Write tensors, each loaded, checked for NaN and released in turn. Call it on a `replace_file` path.

    Raises:
        ValueError: if two tensors have one name, or one holds NaN or infinity.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    for first, second in zip(ordered, ordered[1:], strict=False):
        if first.key == second.key:
            raise ValueError(f"Two tensors would be written as {first.key!r}.")
    with path.open("wb") as file:
        write_header(file, safetensors_header(ordered, metadata))
        for tensor in ordered:
            write_data(file, tensor)
            if progress:
                progress(tensor.num_bytes)


def safetensors_header(ordered: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """The header text for tensors in the order of their data, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in ordered:
        end = position + tensor.num_bytes
        header[tensor.key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def write_header(file: BinaryIO, text: bytes) -> None:
    """The length of the header, then the header."""
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def write_data(file: BinaryIO, tensor: StoredTensor) -> None:
    """The bytes of one tensor."""
    file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: StoredTensor) -> bytes:
    """Load a tensor and view it as bytes; raises ValueError if it holds NaN or infinity."""
    data = load_finite(tensor)
    assert data.dtype == tensor.dtype and tuple(data.shape) == tensor.shape, tensor
    flat = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().tobytes()
