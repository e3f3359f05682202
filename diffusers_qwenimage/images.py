"""Pixels: opening pictures of any kind, checking what pipelines are given, saving with the settings inside.

A picture is RGB with 8 bits per channel, a mask is grey, white where the picture is to be repainted.
"""

import json
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusers_qwenimage.files import replace_file

MAX_PIXELS = 89_478_485  # from here on Pillow warns of a decompression bomb
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# What Pillow's readers raise on damaged files.
READ_ERRORS = (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error, zlib.error)

ImageSource = str | Path | bytes | Image.Image
ImageInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]
logger = logging.getLogger(__name__)


def open_image(
    source: ImageSource, *, background: tuple[int, int, int] = WHITE, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return a picture as upright 8-bit RGB, whatever its file holds.

    The EXIF orientation is applied. 16-bit grey is divided by 257, float grey is taken as 0 to 1 (or 0 to
    255), a transparent picture is laid on `background`, palettes, CMYK and the like are converted. Of an
    animation the first frame is taken (of a Pillow image the one it stands at). Embedded colour profiles
    are not applied.

    Args:
        source: path, the bytes of a file, or a Pillow image (not changed).
        background: colour (0 to 255) under transparent pixels.
        max_pixels: refuse larger pictures before they are decoded.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if it is not a picture, is damaged or too large, or its values have no known range.
    """
    image, name = _load(source, max_pixels)
    return _rgb(image, name, background)


def open_mask(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a mask as upright 8-bit grey ("L"), white where to repaint; transparent pixels count as black.

    Takes and raises the same as `open_image`.
    """
    return open_image(source, background=BLACK, max_pixels=max_pixels).convert("L")


def prepare_images(
    images: ImageInput, *, channels: int = 3, name: str = "image"
) -> list[Image.Image] | Tensor:
    """Check the pictures given to a pipeline and bring them to what `VaeImageProcessor.preprocess` takes.

    Args:
        images: Pillow images (any mode and size), arrays [H, W, C] or [N, H, W, C], tensors [C, H, W] or
            [N, C, H, W], or a list of one of these kinds. For one channel the axis C may be missing. Integers
            must be uint8; floats are 0 to 1, or -1 to 1 where any is negative (as in diffusers).
        channels: 1 (mask), 3 (RGB) or 4 (RGBA).
        name: the argument's name, for messages.

    Returns:
        A list of Pillow images in mode "L", "RGB" or "RGBA", or a float32 tensor [N, C, H, W] in [0, 1].

    Raises:
        ValueError: for another kind or number of channels, NaN or infinite values, values out of range,
            an empty list or a list of different kinds or sizes of arrays.
    """
    items = list(images) if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError(f"{name} is an empty list; give at least one picture.")
    pictures = [item for item in items if isinstance(item, Image.Image)]
    arrays = [item for item in items if isinstance(item, np.ndarray)]
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(pictures) == len(items):
        return [_convert(picture, channels) for picture in pictures]
    if len(arrays) == len(items):
        batches = [_from_numpy(array, channels, name) for array in arrays]
    elif len(tensors) == len(items):
        batches = [_batch(tensor, channels, name, channel_axis=-3) for tensor in tensors]
    else:
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise ValueError(
            f"{name} holds {kinds}; give Pillow images, numpy arrays or torch tensors, one kind at a time "
            "(images.open_image opens files)."
        )
    if len({batch.shape[1:] for batch in batches}) > 1:
        sizes = ", ".join(str(tuple(batch.shape[1:])) for batch in batches)
        raise ValueError(f"{name} holds arrays of different sizes {sizes}; resize them to one size.")
    return torch.cat([_unit_range(batch, name) for batch in batches])


def save_image(image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a picture with `metadata` inside; `path` holds the old file or the complete new one, never half.

    PNG: one text chunk per entry (iTXt where Latin-1 does not suffice). JPEG (quality 95, full colour
    resolution) and WebP (lossless): the entries as JSON in the EXIF field UserComment. `read_metadata` reads
    either. Characters that cannot be stored (lone surrogates, NUL) become U+FFFD.

    Raises:
        ValueError: for an unknown suffix, or transparency in a JPEG.
    """
    format_name = image_format(path)
    entries = {_storable(key): _storable(value) for key, value in (metadata or {}).items()}
    if format_name == "JPEG" and image.mode not in ("RGB", "L"):
        raise ValueError(f"JPEG cannot hold a picture of mode {image.mode}; write {path} as .png or .webp.")
    with replace_file(path) as temporary:
        if format_name == "PNG":
            image.save(temporary, format=format_name, pnginfo=_png_text(entries))
        elif format_name == "JPEG":
            image.save(temporary, format=format_name, quality=95, subsampling=0, exif=_exif(entries))
        else:
            image.save(temporary, format=format_name, lossless=True, exif=_exif(entries))


def image_format(path: str | Path) -> str:
    """Pillow's name of the format that the suffix of `path` asks for; ValueError if it is none we write."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(f"{path} has the suffix {suffix!r}; pictures are written as one of {known}.")
    return FORMATS[suffix]


def read_metadata(path: str | Path) -> dict[str, str]:
    """The `metadata` that `save_image` wrote into a picture; empty if there is none."""
    with Image.open(path) as image:
        image.load()  # text chunks may follow the pixels
        if image.format == "PNG":
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not isinstance(comment, bytes) or not comment.startswith(EXIF_UTF8):
        return {}
    return {str(key): str(value) for key, value in json.loads(comment[len(EXIF_UTF8) :]).items()}


EXIF_UTF8 = b"\0" * 8  # the EXIF code for "encoding not stated"; the JSON behind it is ASCII


def _load(source: ImageSource, max_pixels: int) -> tuple[Image.Image, str]:
    """The first frame, decoded and upright, and how to name it in messages."""
    if isinstance(source, Image.Image):
        name = f"The picture {getattr(source, 'filename', '')}".rstrip()
        return _decode(source, name, max_pixels), name
    if isinstance(source, bytes):
        name, content = "The picture", source
    else:
        name, content = str(source), _read(source)
    if not content:
        raise ValueError(f"{name} is empty (zero bytes); save or download it again.")
    try:
        with warnings.catch_warnings():  # the size is checked against our own limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error} Scale it down first.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read; use PNG, JPEG or WebP.") from error
    except READ_ERRORS as error:
        raise ValueError(f"{name} is damaged ({error}); save or download it again.") from error
    return _decode(image, name, max_pixels), name


def _read(source: str | Path) -> bytes:
    if str(source).startswith(("http://", "https://")):
        raise ValueError(f"{source} is an address; download the picture and give the path of the file.")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist; check the path of the picture.")
    if not path.is_file():
        raise ValueError(f"{source} is not a file; give the path of a picture.")
    return path.read_bytes()


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is too large: {width}x{height} pixels, at most {max_pixels:,} are read. "
            "Scale it down first."
        )
    if width * height == 0:
        raise ValueError(f"{name} has no pixels ({width}x{height}).")
    try:
        if getattr(image, "is_animated", False):
            logger.info("%s is an animation; frame %d is used.", name, image.tell())
        image.load()
        return ImageOps.exif_transpose(image)
    except READ_ERRORS as error:
        raise ValueError(f"{name} is damaged ({error}); save or download it again.") from error


def _rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_bytes(image, name).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        below = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(below, _rgba(image)).convert("RGB")
    return image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image:
    # Pillow converts premultiplied grey only by way of plain grey.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _grey_bytes(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats as 8 bits; the range follows from the mode and the largest value."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values; repair it first.")
    low, high = values.min(), values.max()
    full = 1.0 if image.mode == "F" and high <= 1 else 255.0
    if image.mode.startswith("I;16") or (image.mode == "I" and high > 255):
        full = 65535.0
    if low < 0 or high > full:
        raise ValueError(
            f"{name} has grey values from {low:g} to {high:g} (mode {image.mode}); "
            "scale them to 0 to 1 (float), 0 to 255 or 0 to 65535."
        )
    return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8))


def _convert(picture: Image.Image, channels: int) -> Image.Image:
    if channels == 1:
        return open_mask(picture)
    if channels == 3:
        return open_image(picture)
    image, name = _load(picture, MAX_PIXELS)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey_bytes(image, name)
    return _rgba(image)


def _from_numpy(array: np.ndarray, channels: int, name: str) -> Tensor:
    if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"{name} has the type {array.dtype}; give uint8, or floats from 0 to 1.")
    # A copy, since a tensor cannot share the read-only array of a picture.
    copied = array.astype(np.float32 if array.dtype.kind == "f" else array.dtype)
    return _batch(torch.from_numpy(copied), channels, name, channel_axis=-1)


def _batch(tensor: Tensor, channels: int, name: str, *, channel_axis: int) -> Tensor:
    """[N, C, H, W] from one picture or several, with or without the axis of a single channel."""
    layout = "[N, C, H, W] or [C, H, W]" if channel_axis == -3 else "[N, H, W, C] or [H, W, C]"
    shape = tuple(tensor.shape)
    if channels == 1 and (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[channel_axis] != 1)):
        tensor = tensor.unsqueeze(channel_axis)
    if tensor.ndim not in (3, 4) or tensor.shape[channel_axis] != channels or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}; needed is {layout} with C = {channels}.")
    tensor = tensor if tensor.ndim == 4 else tensor.unsqueeze(0)
    return tensor if channel_axis == -3 else tensor.permute(0, 3, 1, 2)


def _unit_range(batch: Tensor, name: str) -> Tensor:
    """Float32 in [0, 1]."""
    if batch.dtype in (torch.uint8, torch.bool):
        return batch.float() / (255.0 if batch.dtype == torch.uint8 else 1.0)
    if not batch.is_floating_point():
        raise ValueError(f"{name} has the type {batch.dtype}; give uint8, or floats from 0 to 1.")
    values = batch.float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinite values; repair it first.")
    low, high = float(values.min()), float(values.max())
    if low < -1.1 or high > 1.1:  # resizing filters overshoot a little
        raise ValueError(
            f"{name} has float values from {low:g} to {high:g}; needed is 0 to 1, or -1 to 1. "
            "Divide by 255, or give uint8."
        )
    return (values / 2 + 0.5 if low < 0 else values).clamp(0.0, 1.0)


def _storable(text: str) -> str:
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


def _png_text(entries: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for key, value in entries.items():
        info.add_text(key, value)
    return info


def _exif(entries: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    if entries:
        comment = EXIF_UTF8 + json.dumps(dict(entries)).encode("ascii")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif
