"""Files that are never half written, and safetensors headers that are checked before anything is read.

Every artefact of the package is written through `replace_file`: a temporary name in the same folder, flushed
and synced, given the permissions of a normal file, renamed over the target, and the folder synced. Whoever
looks at the target sees the old content or the new one, also after a crash or on a full disk.
"""

import json
import math
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# Bits of each element type of the safetensors format.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`; renamed to `path` on success, removed on error.

    A symbolic link is followed: its target is replaced and the link stays. Parent folders are created.

    Raises:
        IsADirectoryError: if `path` is a folder.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write.")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(8)}.tmp{target.suffix}")
    # Created here, so that the system applies the umask: asking for it would change it for other threads.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    try:
        yield temporary
        sync(temporary)
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


def sync(path: Path) -> None:
    """Ask the system to put a file's or a folder's content on the disk (fsync)."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle of a folder to sync
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (on any device, made contiguous) as one safetensors file, atomically.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    with replace_file(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}.") from error


def write_safetensors_in_turn(
    path: str | Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whose tensors are made one after the other, atomically.

    Args:
        path: where to.
        entries: type (`"BF16"`) and shape of every tensor, in the order in which they will come.
        tensors: their names and values, on any device; each is dropped before the next one is asked for.
        metadata: text of the header.

    Raises:
        ValueError: if the tensors are not those of the entries.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    expected = iter(entries.items())
    with replace_file(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for name, tensor in tensors:
            wanted, (dtype, shape) = next(expected, ("nothing", ("", ())))
            size = tensor.numel() * tensor.element_size()
            if (
                name != wanted
                or tuple(tensor.shape) != shape
                or size * 8 != math.prod(shape) * DTYPE_BITS[dtype]
            ):
                raise ValueError(f"{name} {tuple(tensor.shape)} came where {wanted} {shape} was announced.")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{missing[0]} was announced for {path} and did not come.")


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One line of a safetensors header: type (`"BF16"`), shape, and the byte range within the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file says of itself; `data_start` is the offset of the first tensor byte."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int

    @property
    def file_size(self) -> int:
        """Bytes that the complete file has."""
        return self.data_start + max((entry.end for entry in self.tensors.values()), default=0)


def read_header(path: str | Path) -> SafetensorsHeader:
    """Read and check the header of a local safetensors file.

    Raises:
        ValueError: if the file is not safetensors (a pickle and a web page are named as such), is truncated,
            or its header contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        if start[8:] != b"{":  # else a length such as 0x...80 would pass for the first byte of a pickle
            _refuse_other_files(start, size, str(path))
        length = _header_length(start, size, str(path))
        file.seek(8)
        header = parse_header(file.read(length), str(path))
    if header.file_size != size:
        problem = "truncated" if header.file_size > size else "longer than its header says"
        raise ValueError(
            f"{path} is {problem}: {size:,} bytes, but its header describes {header.file_size:,}. "
            "Fetch it again."
        )
    return header


def parse_header(content: bytes, name: str) -> SafetensorsHeader:
    """Parse the JSON part of a safetensors file (what follows the 8 length bytes); `name` is for messages.

    Raises:
        ValueError: on anything that the format forbids: broken JSON, a key twice, unknown types, shapes that
            do not fit the byte range, gaps or overlaps.
    """
    try:
        raw = json.loads(content, object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} has no readable safetensors header ({error}).") from error
    except KeyError as error:
        raise ValueError(
            f"{name} holds the key {error} twice; which of the two counts is undefined."
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"{name} has no safetensors header: expected a JSON object, got {type(raw).__name__}."
        )
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name}: the metadata of a safetensors file must map text to text.")
    tensors = {key: _entry(key, value, name) for key, value in raw.items()}
    position = 0
    for key, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"{name}: the bytes of {key!r} overlap another tensor or leave a gap.")
        position = entry.end
    return SafetensorsHeader(tensors=tensors, metadata=metadata, data_start=8 + len(content))


def _refuse_other_files(start: bytes, size: int, name: str) -> None:
    if size == 0:
        raise ValueError(f"{name} is empty. Fetch it again.")
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise ValueError(
            f"{name} is a pickle checkpoint. Loading a pickle can run code, so only safetensors are read; "
            "convert it in a sandbox with safetensors.torch.save_file."
        )
    if start.lstrip()[:1] == b"<":
        raise ValueError(f"{name} is a web page, not weights; the download went wrong. Fetch it again.")
    if start[:4] == b"GGUF":
        raise ValueError(f"{name} is a GGUF file; load it with diffusers' GGUFQuantizationConfig.")
    if start[:8] == b"version ":
        raise ValueError(f"{name} is a Git LFS pointer, not the weights; run `git lfs pull`.")


def _header_length(start: bytes, size: int, name: str) -> int:
    if len(start) < 8:
        raise ValueError(f"{name} is not a safetensors file: {size} bytes. Fetch it again.")
    length: int = struct.unpack("<Q", start[:8])[0]
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise ValueError(
            f"{name} is not a complete safetensors file: a header of {length:,} bytes in a file of {size:,}."
        )
    return length


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result


def _entry(key: str, value: object, name: str) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if (
            all(type(size) is int and size >= 0 for size in shape) and 0 <= start <= end
        ):
            entry = TensorEntry(dtype=dtype, shape=tuple(shape), start=start, end=end)
        case _:
            raise ValueError(f"{name}: the header entry of {key!r} is malformed.")
    if entry.dtype not in DTYPE_BITS:
        raise ValueError(f"{name}: {key!r} has the unknown type {entry.dtype!r}.")
    if math.prod(entry.shape) * DTYPE_BITS[entry.dtype] != 8 * (entry.end - entry.start):
        raise ValueError(f"{name}: the shape of {key!r} {entry.shape} does not fit its bytes.")
    return entry
