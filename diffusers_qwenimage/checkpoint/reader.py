"""One table of named tensors over one or several safetensors files. Only headers are read until asked."""

import glob
import json
import math
import mmap
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from diffusers_qwenimage.files import TensorEntry, read_header

INDEX_SUFFIX = ".safetensors.index.json"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAIN_STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers write
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: the file that holds it.
        key: its name in the file.
        entry: its line of the header (type, shape, bytes).
        offset: of its first byte in the file.
        value: the tensor itself, if it is in memory and not in a file.
    """

    file: Path
    key: str
    entry: TensorEntry
    offset: int = 0
    value: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors by name, across files. Immutable; `renamed` and `select` give other views of the same files."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, in the order of first use."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self.tensors[name].entry.shape

    def renamed(self, names: Mapping[str, str]) -> "Checkpoint":
        """The tensors named in `names` (old -> new), under their new names.

        Raises:
            ValueError: if two tensors get the same new name.
        """
        result: dict[str, StoredTensor] = {}
        for old, new in names.items():
            if new in result:
                raise ValueError(
                    f"{self.tensors[old].file}: {self.tensors[old].key!r} and {result[new].key!r} both mean "
                    f"{new!r}."
                )
            result[new] = self.tensors[old]
        return Checkpoint(tensors=result, metadata=self.metadata)

    def select(self, names: Iterable[str]) -> "Checkpoint":
        """The tensors of these names only."""
        return self.renamed({name: name for name in names})

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor): on the CPU, as stored, memory-mapped; files one after the other.

        The mapping is private: writing to a tensor does not change the file.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            if tensor.value is not None:
                yield name, tensor.value
            else:
                by_file[tensor.file].append(name)
        for file, names in by_file.items():
            with file.open("rb") as opened:
                for name in sorted(names, key=lambda name: self.tensors[name].offset):
                    yield name, _read(opened, self.tensors[name])


def open_checkpoint(source: str | Path | Sequence[str | Path]) -> Checkpoint:
    """Open safetensors file(s) as one checkpoint.

    `source` is a file, an index (`*.safetensors.index.json`), a folder, or a list of these. A single path of
    one shard stands for all shards beside it.

    Raises:
        FileNotFoundError: if a file or a shard is missing; it is named.
        ValueError: if a file is not a complete safetensors file, or two files hold the same key.
    """
    files = weight_files(source)
    problem = shard_problem(files)
    if problem:
        raise FileNotFoundError(problem)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_header(file)
        metadata.update(header.metadata)
        for key, entry in header.tensors.items():
            if key in tensors:
                raise ValueError(
                    f"The key {key!r} is in {tensors[key].file} and in {file}; which of the two counts is "
                    "undefined. Give the files of one checkpoint only."
                )
            offset = header.data_start + entry.start
            tensors[key] = StoredTensor(file=file, key=key, entry=entry, offset=offset)
    if not tensors:
        raise ValueError(f"{', '.join(map(str, files))} holds no tensors.")
    _check_index(files, tensors)
    return Checkpoint(tensors=tensors, metadata=metadata)


def from_tensors(tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint of tensors that are in memory already (a state dict).

    Raises:
        ValueError: for a type that safetensors files do not have.
    """
    stored = {}
    for name, value in tensors.items():
        if value.dtype not in DTYPE_NAMES:
            raise ValueError(f"The tensor {name!r} has the type {value.dtype}, which no checkpoint holds.")
        entry = TensorEntry(dtype=DTYPE_NAMES[value.dtype], shape=tuple(value.shape), start=0, end=0)
        stored[name] = StoredTensor(file=Path("state dict"), key=name, entry=entry, value=value)
    return Checkpoint(tensors=stored, metadata={})


def weight_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The weight files that `source` means, each once, in order: see `open_checkpoint`.

    Raises:
        FileNotFoundError: if there is nothing, or an index names a shard that is not there.
        ValueError: if an index is not readable.
    """
    if isinstance(source, (str, Path)):
        files = _siblings(_expand(Path(source)))
    else:
        files = [file for item in source for file in _expand(Path(item))]
    if not files:
        raise FileNotFoundError("No weight files were given; name at least one .safetensors file.")
    return list(dict.fromkeys(files))


def shard_problem(files: Sequence[Path]) -> str | None:
    """Say which shards of numbered files (`name-00001-of-00009.safetensors`) are not in the list, if any."""
    groups: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := SHARD_NAME.fullmatch(file.name):
            groups[file.parent, match["stem"], int(match["total"])].add(int(match["number"]))
    for (folder, stem, total), numbers in groups.items():
        missing = [
            f"{stem}-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1) if n not in numbers
        ]
        if missing:
            beside = [name for name in missing if (folder / name).is_file()]
            advice = (
                "it is in the same folder: give it too, or the folder"
                if len(beside) == len(missing)
                else "fetch it"
            )
            return (
                f"{len(numbers)} of {total} shards of {folder / stem}; missing {quote(missing)} ({advice})."
            )
    return None


def quote(names: Iterable[object], limit: int = 5) -> str:
    """The first few of `names`, for a message."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(repr(name) if isinstance(name, str) else str(name) for name in listed[:limit]) + more


def _read(file: BinaryIO, tensor: StoredTensor) -> Tensor:
    """Map one tensor. One mapping per tensor, and not per file as safetensors does: Linux refuses to map more
    than the machine's memory at once, and a 41 GB file must load on a smaller machine."""
    entry = tensor.entry
    if entry.dtype not in DTYPES:
        raise ValueError(
            f"{tensor.file}: {tensor.key!r} has the type {entry.dtype}, which torch does not have."
        )
    dtype, num_elements = DTYPES[entry.dtype], math.prod(entry.shape)
    if num_elements == 0:
        return torch.empty(entry.shape, dtype=dtype)
    length = entry.end - entry.start
    if tensor.offset % dtype.itemsize:  # behind a tensor of odd length
        file.seek(tensor.offset)
        return torch.frombuffer(bytearray(file.read(length)), dtype=dtype).reshape(entry.shape)
    inside = tensor.offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(file.fileno(), inside + length, access=mmap.ACCESS_COPY, offset=tensor.offset - inside)
    return torch.frombuffer(pages, dtype=dtype, count=num_elements, offset=inside).reshape(entry.shape)


def _siblings(files: list[Path]) -> list[Path]:
    match = SHARD_NAME.fullmatch(files[0].name) if len(files) == 1 else None
    if match is None:
        return files
    pattern = f"{glob.escape(match['stem'])}-?????-of-{match['total']}.safetensors"
    return sorted(files[0].parent.glob(pattern))


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _folder_files(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _index_files(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    return [path]


def _folder_files(folder: Path) -> list[Path]:
    """The main weights of a folder; variants beside them (`model.fp16.safetensors`) are left alone."""
    for stem in MAIN_STEMS:
        if (index := folder / f"{stem}{INDEX_SUFFIX}").is_file():
            return _index_files(index)
        if (file := folder / f"{stem}.safetensors").is_file():
            return [file]
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    files = _index_files(indices[0]) if len(indices) == 1 else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"The folder {folder} holds no .safetensors file.")
    return files


def _index_files(index: Path) -> list[Path]:
    names = list(dict.fromkeys(_weight_map(index).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {quote(missing)}, which is not beside it. Fetch it.")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> file name. A name is never a path: an index must not point out of its folder."""
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index} is not a readable index ({error}). Fetch it again.") from error
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f'{index} has no "weight_map"; it is not an index of shards.')
    for name in weights.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name!r}; a shard must be a .safetensors file in the same folder."
            )
    return weights


def _check_index(files: Sequence[Path], tensors: Mapping[str, StoredTensor]) -> None:
    """Shards must hold what an index beside them promises."""
    for folder, stem in {
        (file.parent, match["stem"]) for file in files if (match := SHARD_NAME.fullmatch(file.name))
    }:
        index = folder / f"{stem}{INDEX_SUFFIX}"
        if not index.is_file():
            continue
        wrong = [
            key
            for key, name in _weight_map(index).items()
            if key not in tensors or tensors[key].file.name != name
        ]
        if wrong:
            raise ValueError(
                f"{index} places {quote(wrong)} in shards that do not hold them; index and shards are of "
                "different checkpoints. Fetch them again."
            )
