"""Pictures that were looked at once, before anything is trained: what is wrong is said in one report.

A picture is brought to its size as DiffSynth-Studio does it: scaled (bilinear) until it covers the size, then
cut around its middle. Fixed size: height x width. Dynamic resolution: the picture's own size, scaled down to
`max_pixels` if it has more, its sides cut down to multiples of 16 (`bucket_step`); never enlarged.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusers_qwenimage.images import open_image

from .config import SIDE, TrainConfig
from .metadata import SUFFIXES, Row

logger = logging.getLogger(__name__)

NUM_LISTED = 20  # faults that a report lists
THREADS = 8


class BadImage(ValueError):
    """A picture that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture that was found usable.

    Attributes:
        image: path of the file, or its bytes.
        caption: its text.
        name: for messages.
        digest: SHA-256 of the file.
        size: (width, height) it is trained at.
    """

    image: Path | bytes
    caption: str
    name: str
    digest: str
    size: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.size[1] // SIDE, self.size[0] // SIDE


def inspect_rows(rows: Sequence[Row], config: TrainConfig, *, progress: bool = True) -> list[Sample]:
    """Open every picture once; the usable ones, in the order of the rows.

    Raises:
        ValueError: with a list of the bad ones, if `on_bad_image` is error, or if none is left.
    """
    base = Path(config.dataset_base_path).resolve()
    with ThreadPoolExecutor(THREADS) as pool:
        looked = pool.map(lambda row: _inspect(row, base, config), rows)
        found = list(tqdm(looked, total=len(rows), desc="Checking pictures", disable=not progress))
    samples = [sample for sample in found if isinstance(sample, Sample)]
    faults = [fault for fault in found if isinstance(fault, str)]
    if faults:
        report = _report(faults, len(rows))
        if config.on_bad_image == "error":
            raise ValueError(f"{report} Repair or remove them, or pass --on_bad_image skip.")
        if not samples:
            raise ValueError(f"{report} None is left.")
        logger.warning("%s They are left out.", report)
    empty = [sample.name for sample in samples if not sample.caption.strip()]
    if empty:
        logger.warning("%d captions are empty: %s.", len(empty), _listing(empty))
    return samples


def load_picture(sample: Sample) -> Image.Image:
    """The picture, upright RGB, at its training size.

    Raises:
        BadImage: if the file has changed or cannot be read any more.
    """
    content = sample.image if isinstance(sample.image, bytes) else _content(sample.image)
    if hashlib.sha256(content).hexdigest() != sample.digest:
        raise BadImage(f"{sample.name} has changed since the start of the run.")
    try:
        return cover(open_image(content), sample.size)
    except ValueError as error:
        raise BadImage(f"{sample.name}: {error}") from error


def training_size(size: tuple[int, int], config: TrainConfig) -> tuple[int, int]:
    """(width, height) that a picture of `size` (width, height) is trained at."""
    if config.height is not None and config.width is not None:
        return config.width, config.height
    width, height = size
    if width * height > config.max_pixels:
        scale = math.sqrt(width * height / config.max_pixels)
        width, height = int(width / scale), int(height / scale)
    step = config.bucket_step
    # A side shorter than the step is cut to multiples of 16 instead of to nothing.
    return width // step * step or width // SIDE * SIDE, height // step * step or height // SIDE * SIDE


def cover(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale until the picture covers `size` (width, height), and cut around the middle."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = round(picture.width * scale), round(picture.height * scale)
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size[0]) / 2), round((height - size[1]) / 2)
    return scaled.crop((left, top, left + size[0], top + size[1]))


def to_pixels(picture: Image.Image) -> Tensor:
    """[1, 3, height, width] in [-1, 1], fp32."""
    values = torch.from_numpy(np.asarray(picture).astype(np.float32))
    return (values / 127.5 - 1).permute(2, 0, 1)[None]


def _inspect(row: Row, base: Path, config: TrainConfig) -> Sample | str:
    """A sample, or what is wrong."""
    try:
        source = row.image if isinstance(row.image, bytes) else _inside(row.image, base)
        content = source if isinstance(source, bytes) else _content(source)
        row.caption.encode()  # a lone surrogate is no text
        picture = open_image(content)
    except (ValueError, OSError) as error:
        return f"{row.place}: {error}"
    size = training_size(picture.size, config)
    if min(size) < SIDE:
        return f"{row.place}: {picture.width}x{picture.height} pixels are fewer than {SIDE}x{SIDE}"
    return Sample(
        image=source,
        caption=row.caption,
        name=row.place if isinstance(source, bytes) else str(row.image),
        digest=hashlib.sha256(content).hexdigest(),
        size=size,
    )


def _inside(name: str, base: Path) -> Path:
    """The path of a file of the dataset; not one outside of its folder, not an address."""
    if not name.strip() or "\0" in name:
        raise ValueError(f"the name of the picture is {name!r}")
    if "://" in name:
        raise ValueError(f"{name} is an address; download the picture into the dataset's folder")
    path = base / name
    if not path.exists() and "\\" in name:
        path = base / name.replace("\\", "/")
    if not path.resolve().is_relative_to(base):
        raise ValueError(f"{name} leaves the dataset's folder")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} is not one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{name} does not exist in {base}")
    return path


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"{path} cannot be read: {error}") from error


def _report(faults: Sequence[str], total: int) -> str:
    return f"{len(faults)} of {total} pictures cannot be used: {_listing(faults)}."


def _listing(items: Sequence[str]) -> str:
    more = f"; and {len(items) - NUM_LISTED} more" if len(items) > NUM_LISTED else ""
    return "; ".join(item.rstrip(".") for item in items[:NUM_LISTED]) + more
