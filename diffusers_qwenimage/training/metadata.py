"""The rows of a dataset: which files, and what their captions are. No picture is opened here."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from .config import TrainConfig, comma_list

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
HUB_PREFIX = "hf:"
MAX_TEXT_BYTES = 1_000_000  # of a caption's file


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture and its caption.

    Attributes:
        image: what the metadata says, a path within the folder, or the bytes of a file.
        caption: may be empty.
        place: where it stands, for messages.
    """

    image: str | bytes
    caption: str
    place: str


def read_rows(config: TrainConfig) -> list[Row]:
    """All rows of the dataset.

    Raises:
        FileNotFoundError: if the folder or the metadata does not exist.
        ValueError: if it cannot be read, has no rows, or lacks a column.
    """
    folder = Path(config.dataset_base_path)
    if not folder.is_dir():
        return _hub_rows(config)
    metadata = _find_metadata(folder, config.dataset_metadata_path)
    if metadata is None:
        rows = _paired_files(folder)
        needed = f"{folder} holds no pictures ({', '.join(SUFFIXES)}) and no metadata file."
    else:
        rows = _select(_numbered(metadata), config, metadata.name)
        needed = f"{metadata} has no rows."
    if not rows:
        raise ValueError(needed)
    return rows


def _find_metadata(folder: Path, given: str | None) -> Path | None:
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"The metadata file {path} does not exist.")
        if path.suffix not in METADATA_SUFFIXES:
            raise ValueError(f"{path}: metadata must be one of {', '.join(METADATA_SUFFIXES)}.")
        return path
    found = [folder / f"metadata{suffix}" for suffix in METADATA_SUFFIXES]
    return next((path for path in found if path.is_file()), None)


def _numbered(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, row) of every row of a metadata file."""
    try:
        if path.suffix == ".parquet":
            return [(f"row {i}", row) for i, row in enumerate(_parquet(path), start=1)]
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(_csv(text))
        if path.suffix == ".jsonl":
            lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
            return [(f"line {i}", _object(json.loads(line), f"line {i}")) for i, line in lines]
        listed = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(listed, list):
        raise ValueError(f"{path} must hold a list of objects, got {type(listed).__name__}.")
    return [(f"entry {i}", _object(row, f"entry {i}")) for i, row in enumerate(listed, start=1)]


def _object(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"Metadata, {place}: expected an object with columns, got {type(row).__name__}.")
    return row


def _csv(text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    for row in reader:
        if None in row:
            raise csv.Error(f"line {reader.line_num} has more cells than columns; quote captions with commas")
        yield f"line {reader.line_num}", row


def _parquet(path: Path) -> list[dict[str, Any]]:
    _need("pyarrow", "parquet files")
    rows: list[dict[str, Any]] = import_module("pyarrow.parquet").read_table(path).to_pylist()
    return rows


def _need(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise ValueError(
            f'{what} need the package {package}: pip install "diffusers-qwenimage[train]" (or {package}).'
        )


def _select(rows: Sequence[tuple[str, Mapping[str, Any]]], config: TrainConfig, name: str) -> list[Row]:
    """Check the columns and take what is needed of each row."""
    columns = dict.fromkeys(column for _, row in rows for column in row)
    wanted = (*comma_list(config.data_file_keys), config.caption_column)
    for column in wanted:
        if rows and column not in columns:
            raise ValueError(
                f"{name} has no column {column!r} (data_file_keys, caption_column); its columns are "
                f"{', '.join(map(repr, columns))}."
            )
    image_column = wanted[0]
    return [
        Row(
            image=_image(row.get(image_column)),
            caption=_caption(row.get(config.caption_column)),
            place=f"{name}, {place}",
        )
        for place, row in rows
    ]


def _image(cell: Any) -> str | bytes:
    """A path, or the bytes that Hugging Face datasets keep in a column."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return cell if isinstance(cell, str | bytes) else ""


def _caption(cell: Any) -> str:
    return cell if isinstance(cell, str) else "" if cell is None else str(cell)


def _paired_files(folder: Path) -> list[Row]:
    """Every picture of a folder, with the text file of the same name if there is one."""
    rows = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in relative.parts):
            rows.append(
                Row(image=relative.as_posix(), caption=_caption_file(path), place=relative.as_posix())
            )
    return rows


def _caption_file(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return ""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path} is too large for a caption.")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _hub_rows(config: TrainConfig) -> list[Row]:
    name = config.dataset_base_path.removeprefix(HUB_PREFIX)
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.exists()
    if is_path and name == config.dataset_base_path:
        raise FileNotFoundError(
            f"The dataset folder {name} does not exist. For a dataset of Hugging Face give "
            f"{HUB_PREFIX}ORG/NAME."
        )
    if find_spec("datasets") is None:
        raise FileNotFoundError(
            f"The dataset folder {name} does not exist. If it is the id of a Hugging Face dataset, "
            'install the package datasets: pip install "diffusers-qwenimage[train]".'
        )
    datasets = import_module("datasets")
    loaded = datasets.load_dataset(name, split="train")
    column = comma_list(config.data_file_keys)[0]
    if column in loaded.column_names:
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    rows = _select([(f"row {i}", row) for i, row in enumerate(loaded, start=1)], config, name)
    return [row if isinstance(row.image, bytes) else _absolute(row) for row in rows]


def _absolute(row: Row) -> Row:
    """A row whose picture the package datasets has put into its own cache, as its bytes."""
    assert isinstance(row.image, str)
    content = Path(row.image).read_bytes() if row.image else b""
    return Row(image=content, caption=row.caption, place=row.place)
