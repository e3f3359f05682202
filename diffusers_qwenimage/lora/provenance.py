"""The way back: a converted file remembers its source so well that the source can be written again, byte by
byte.

The record lies in the metadata of the converted file: the header of the source (names, order, types,
metadata), the bytes of its alphas, which scale was multiplied into which tensor, and the SHA-256 of the whole
file. Restoring reads the factors from the converted file, undoes what was done, and checks the hash before
the result gets its name. So a converted file that was changed meanwhile is never passed off as its source.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusers_qwenimage.files import parse_header
from diffusers_qwenimage.lora.architectures import block_index
from diffusers_qwenimage.lora.factors import derived, exact_power_product
from diffusers_qwenimage.lora.formats import parse_key
from diffusers_qwenimage.lora.fused import fuse, fuse_shared, split_all
from diffusers_qwenimage.lora.metadata import PROVENANCE_KEY
from diffusers_qwenimage.lora.read import TORCH_DTYPES, LoraFile, parse_tensors
from diffusers_qwenimage.lora.updates import LoraUpdate, StoredTensor
from diffusers_qwenimage.lora.write import tensor_bytes

VERSION = 1
MAX_RECORD_BYTES = 100_000_000  # of the unpacked record; a header of safetensors may have no more
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a converted file says of its source."""

    format: str
    sha256: str
    header: bytes
    alphas: Mapping[str, bytes]
    folded: Mapping[str, float]
    adapter_config: str | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of a converted file, rebuilt: its header, its tensors in order, and its configuration."""

    record: Record
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the file, tensor by tensor."""
        yield len(self.record.header).to_bytes(8, "little") + self.record.header
        for tensor in self.tensors:
            yield tensor_bytes(tensor)

    def matches(self) -> bool:
        """Whether these are the bytes that the record was made from."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest() == self.record.sha256


def make_record(
    path: Path,
    file: LoraFile,
    folded: Mapping[str, float],
    adapter_config: str | None,
    *,
    reversible: bool,
) -> str:
    """The metadata entry for a conversion of the file at `path`, which was read as `file`.

    Where the conversion cannot be undone, the entry only names the source.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        header = stream.read(8)
        header += stream.read(int.from_bytes(header, "little"))
        digest.update(header)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    named = {"version": VERSION, "format": dominant_format(file), "sha256": digest.hexdigest()}
    if not reversible:
        return json.dumps(named)
    alphas = {key: tensor_bits(file.tensors[key]).hex() for key in file.tensors if _is_alpha(key)}
    packed = json.dumps(
        {
            "header": header[8:].decode("utf-8"),
            "alphas": list(alphas.values()) if len(set(alphas.values())) > 1 else list(alphas.values())[:1],
            "folded": dict(folded),
            "adapter_config": adapter_config,
        }
    )
    return json.dumps({**named, "source": base64.b64encode(zlib.compress(packed.encode(), 9)).decode()})


def dominant_format(file: LoraFile) -> str:
    """The format of a file, or "mixed"."""
    return next(iter(file.formats)) if len(file.formats) == 1 else "mixed"


def read_record(metadata: Mapping[str, str]) -> Record | None:
    """The record in the metadata of a file; None if there is none or it is not one of ours."""
    if PROVENANCE_KEY not in metadata:
        return None
    try:
        outer = json.loads(metadata[PROVENANCE_KEY])
        if outer["version"] != VERSION:
            return None
        unpacker = zlib.decompressobj()
        inner = json.loads(unpacker.decompress(base64.b64decode(outer["source"]), MAX_RECORD_BYTES))
        header = inner["header"].encode()
        keys = [key for key in parse_header(header, "provenance").tensors if _is_alpha(key)]
        values = inner["alphas"] * len(keys) if len(inner["alphas"]) == 1 else inner["alphas"]
        return Record(
            format=str(outer["format"]),
            sha256=str(outer["sha256"]),
            header=header,
            alphas={key: bytes.fromhex(value) for key, value in zip(keys, values, strict=True)},
            folded={str(key): float(value) for key, value in inner["folded"].items()},
            adapter_config=inner["adapter_config"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None  # the entry is text in somebody's file: what cannot be read is no record


def restore(file: LoraFile, to: str) -> Source | None:
    """The source that a file was converted from, if it was of the format `to` ("original": whatever it was).

    Goes back over several conversions. None if there is no such source or the file was changed since.
    """
    current = file
    while record := read_record(current.metadata):
        source = _rebuild(current, record)
        if source is None:
            return None
        if to in ("original", record.format):
            return source if source.matches() else None
        current = parse_tensors(
            {tensor.key: tensor for tensor in source.tensors},
            name=file.name,
            metadata=source.metadata,
            adapter_config=None if record.adapter_config is None else json.loads(record.adapter_config),
        )
    return None


def _rebuild(file: LoraFile, record: Record) -> Source | None:
    header = parse_header(record.header, "provenance")
    available = _by_role(file)
    tensors = []
    for key, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            return None
        if key in record.alphas:
            tensors.append(_from_bits(key, dtype, entry.shape, record.alphas[key]))
            continue
        found = parse_key(key)
        role = (found[1].component, found[1].module, found[1].role) if found else None
        size = math.prod(entry.shape)
        candidates = [t for t in available.get(role, ()) if math.prod(t.shape) == size] if role else []
        if not candidates:
            return None
        tensor = candidates[0]
        tensors.append(_undone(key, dtype, entry.shape, tensor, record.folded.get(key)))
    return Source(record=record, tensors=tuple(tensors), metadata=header.metadata)


def _by_role(file: LoraFile) -> dict[tuple[str, str, str], list[StoredTensor]]:
    """Every tensor of a file by what it is, with fused modules in parts and parts as fused modules.

    There may be several candidates; the shape decides, and in the end the hash of the whole file.
    """
    split = split_all(file.updates, file.architecture)
    found: dict[tuple[str, str, str], list[StoredTensor]] = {}
    for update in (*file.updates, *split, *_fused(file, split)):
        for role, tensor in update.tensors.items():
            found.setdefault((update.component, update.module, role), []).append(tensor)
    return found


def _fused(file: LoraFile, split: Sequence[LoraUpdate]) -> list[LoraUpdate]:
    by_module = {u.module: u for u in split if u.component == "transformer" and u.kind == "lora"}
    architecture = file.architecture
    blocks = {index for module in by_module if (index := block_index(module)) is not None}
    result = []
    for path in (f"{architecture.blocks}.{block}" for block in sorted(blocks)):
        for name, relative in architecture.fused.items():
            parts = [f"{path}.{part}" for part in relative]
            present = [part for part in parts if part in by_module]
            if len(present) == len(parts):
                result.append(fuse_shared(f"{path}.{name}", parts, by_module))
            if present and all(by_module[part].scale.is_one for part in present):
                result.append(fuse(f"{path}.{name}", parts, by_module))
    return result


def _is_alpha(key: str) -> bool:
    found = parse_key(key)
    return found is not None and found[1].role == "alpha"


def tensor_bits(tensor: StoredTensor) -> bytes:
    """The bytes of a tensor, whatever its numbers are."""
    return tensor.load().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _from_bits(key: str, dtype: torch.dtype, shape: tuple[int, ...], bits: bytes) -> StoredTensor:
    return derived(key, dtype, shape, lambda: torch.frombuffer(bytearray(bits), dtype=dtype).reshape(shape))


def _undone(
    key: str, dtype: torch.dtype, shape: tuple[int, ...], tensor: StoredTensor, scale: float | None
) -> StoredTensor:
    def load() -> Tensor:
        data = tensor.load()
        if scale is not None:
            quick = exact_power_product(data, 1 / scale)
            data = quick if quick is not None else data.double() / scale
        return data.to(dtype).reshape(shape)

    return derived(key, dtype, shape, load)
