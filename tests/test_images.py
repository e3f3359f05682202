"""Opening, checking and saving pictures."""

import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import ExifTags, Image

from diffusers_qwenimage.images import (
    image_format,
    open_image,
    open_mask,
    prepare_images,
    read_metadata,
    save_image,
)

RED = (255, 0, 0)


def file_bytes(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


def gradient(height: int = 6, width: int = 9) -> Image.Image:
    values = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


# Opening: one test for each mode.


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_open_opaque_modes_show_what_pillow_converts(mode: str) -> None:
    image = Image.new("LAB", (2, 2), (128, 10, 20)) if mode == "LAB" else gradient().convert(mode)
    opened = open_image(image)
    assert opened.mode == "RGB"
    assert opened.tobytes() == image.convert("RGB").tobytes()


def test_open_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / "grey.png"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode == "I;16"
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(open_mask(path)).tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_open_16_bit_grey_tiff_in_both_byte_orders(order: str) -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], dtype="<u2"))
    if order == ">u2":
        raw = np.array([[0, 257, 65535]], dtype=order).tobytes()
        image = Image.frombytes("I;16B", (3, 1), raw)
    assert np.asarray(open_image(image))[0, :, 0].tolist() == [0, 1, 255]


def test_open_16_bit_pgm() -> None:
    content = b"P5 3 1 65535\n" + np.array([0, 257, 65535], dtype=">u2").tobytes()
    assert np.asarray(open_image(content))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 128, 255], [0, 128, 255]), ([0, 257, 65535], [0, 1, 255])],
)
def test_open_32_bit_grey_takes_its_range_from_the_largest_value(
    values: list[int], expected: list[int]
) -> None:
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I"
    assert np.asarray(open_image(image))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 64.0, 255.0], [0, 64, 255])],
)
def test_open_float_grey(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert np.asarray(open_image(image))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [-1.0, 256.0, float("nan"), float("inf")])
def test_open_float_grey_without_known_range_is_refused(value: float) -> None:
    image = Image.fromarray(np.array([[0.0, value]], dtype=np.float32))
    with pytest.raises(ValueError, match="grey values|NaN or infinite"):
        open_image(image)


def test_open_32_bit_grey_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grey values from -1 to 70000 \(mode I\)"):
        open_image(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)))


def transparent(mode: str) -> Image.Image:
    """One hidden and one visible pixel."""
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((1, 0), 1)
        return Image.open(BytesIO(file_bytes(image, transparency=0)))
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 255, 255))
    if mode == "PA":
        palette = Image.new("PA", (2, 1), (0, 0))
        palette.putpalette([255, 0, 0, 0, 0, 255])
        palette.putpixel((1, 0), (1, 255))
        return palette
    if mode == "La":
        return rgba.convert("LA").convert("La")
    return rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "PA"])
def test_open_lays_transparent_pixels_on_the_background(mode: str) -> None:
    image = transparent(mode)
    visible = 29 if mode in ("LA", "La") else (0, 0, 255)  # blue, and its luminance
    visible = (visible,) * 3 if isinstance(visible, int) else visible
    white = open_image(image)
    assert [white.getpixel((0, 0)), white.getpixel((1, 0))] == [(255, 255, 255), visible]
    green = open_image(image, background=(0, 255, 0))
    assert [green.getpixel((0, 0)), green.getpixel((1, 0))] == [(0, 255, 0), visible]


def test_open_rgb_with_a_transparent_colour() -> None:
    content = file_bytes(Image.new("RGB", (1, 1), RED), transparency=RED)
    assert open_image(content).getpixel((0, 0)) == (255, 255, 255)


def test_open_half_transparent_pixel_is_mixed() -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert open_image(image).getpixel((0, 0)) == (255, 127, 127)


def test_open_mask_counts_transparent_as_black() -> None:
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    image.putpixel((1, 0), (255, 255, 255, 255))
    mask = open_mask(image)
    assert mask.mode == "L"
    assert list(mask.tobytes()) == [0, 255]


def test_open_leaves_the_given_image_alone() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    before = image.tobytes()
    open_image(image)
    assert image.mode == "RGBA"
    assert image.tobytes() == before


# Opening: orientation, frames, sizes.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["path", "bytes", "image"])
def test_open_applies_the_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.new("RGB", (3, 2), "white")
    stored.putpixel((0, 0), RED)  # where the stored top left pixel is shown:
    shown = {1: (0, 0), 2: (2, 0), 3: (2, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 2), 8: (0, 2)}
    content = file_bytes(stored, exif=exif)
    path = tmp_path / "turned.png"
    path.write_bytes(content)
    source = {"path": path, "bytes": content, "image": Image.open(BytesIO(content))}[kind]
    opened = open_image(source)
    assert opened.size == ((3, 2) if orientation < 5 else (2, 3))
    assert opened.getpixel(shown[orientation]) == RED


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_open_takes_the_first_frame_and_says_so(format_name: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
    options = {} if format_name == "GIF" else {"lossless": True} if format_name == "WEBP" else {}
    content = file_bytes(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
    with caplog.at_level("INFO"):
        assert open_image(content).getpixel((1, 1)) == RED
    assert "is an animation; frame 0 is used" in caplog.text


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1), (13, 7)])
def test_open_keeps_odd_sizes(size: tuple[int, int]) -> None:
    assert open_image(file_bytes(Image.new("RGB", size))).size == size


@pytest.mark.parametrize("side", [9500, 13500])  # above Pillow's warning and above its error
def test_open_refuses_gigantic_pictures_before_decoding(side: int, tmp_path: Path) -> None:
    path = tmp_path / "gigantic.png"
    path.write_bytes(file_bytes(Image.new("1", (side, side))))
    with pytest.raises(ValueError, match=r"gigantic\.png is too large.*Scale it down first"):
        open_image(path)


def test_open_size_limit_can_be_set() -> None:
    with pytest.raises(ValueError, match="9x6 pixels, at most 53 are read"):
        open_image(gradient(), max_pixels=53)
    assert open_image(gradient(), max_pixels=54).size == (9, 6)


# Opening: what is no picture.


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_open_truncated_file_is_refused_by_name(format_name: str, tmp_path: Path) -> None:
    content = file_bytes(Image.effect_noise((64, 64), 90).convert("RGB"), format_name)
    path = tmp_path / f"half.{format_name.lower()}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"half\.{format_name.lower()} is (damaged|not a picture)"):
        open_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just text", "is not a picture"),
        (b"<html></html>", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n", "is not a picture|is damaged"),
        (b"\xff\xd8\xff", "is not a picture|is damaged"),
    ],
)
def test_open_other_content_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"picture\.png ({message})"):
        open_image(path)
    with pytest.raises(ValueError, match=f"The picture ({message})"):
        open_image(content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on the damage
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_open_damaged_bytes_give_a_picture_or_a_value_error(format_name: str) -> None:
    content = file_bytes(gradient(24, 24), format_name)
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except ValueError as error:
            assert "The picture" in str(error)


def test_open_missing_file_folder_and_address(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="is not a file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="is an address; download"):
        open_image("https://example.org/cat.png")


# What pipelines are given.


def preprocessed(prepared: list[Image.Image] | torch.Tensor) -> torch.Tensor:
    return VaeImageProcessor(vae_scale_factor=8).preprocess(prepared, height=16, width=24)


def test_prepare_gives_the_same_for_every_kind() -> None:
    image = gradient(16, 24)
    array = np.asarray(image)
    unit = torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)
    expected = preprocessed([image])
    kinds = {
        "Pillow": image,
        "list": [image],
        "uint8 HWC": array,
        "uint8 NHWC": array[None],
        "float HWC": array.astype(np.float32) / 255,
        "float64 list": [array / 255.0],
        "tensor CHW": unit,
        "tensor NCHW": unit[None],
        "tensor list": [unit],
        "uint8 tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "signed tensor": unit * 2 - 1,
        "signed array": array.astype(np.float32) / 127.5 - 1,
    }
    for kind, value in kinds.items():
        result = preprocessed(prepare_images(value))
        assert result.shape == (1, 3, 16, 24), kind
        # Rounding of the scaling between the ranges, in float32.
        assert (result - expected).abs().max() < 1e-6, kind


def test_prepare_batches_and_lists_of_batches() -> None:
    batch = torch.rand(2, 3, 8, 8)
    result = prepare_images([batch, batch[0]])
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, torch.cat([batch, batch[:1]]))


def test_prepare_low_precision_tensor() -> None:
    result = prepare_images(torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16))
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float32
    assert result.unique().tolist() == [0.5]


def test_prepare_pillow_images_in_any_mode() -> None:
    transparent_image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgb, mask, rgba = (prepare_images(transparent_image, channels=n)[0] for n in (3, 1, 4))
    assert isinstance(rgb, Image.Image) and rgb.getpixel((0, 0)) == (255, 255, 255)
    assert isinstance(mask, Image.Image) and mask.mode == "L" and mask.getpixel((0, 0)) == 0
    assert isinstance(rgba, Image.Image) and rgba.getpixel((0, 0)) == (255, 0, 0, 0)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(8, 6),
        torch.ones(1, 8, 6),
        torch.ones(1, 1, 8, 6),
        np.ones((8, 6), dtype=bool),
        np.ones((8, 6, 1)),
        np.full((1, 8, 6, 1), 255, dtype=np.uint8),
    ],
)
def test_prepare_masks_with_and_without_the_channel_axis(mask: torch.Tensor | np.ndarray) -> None:
    result = prepare_images(mask, channels=1, name="mask_image")
    assert isinstance(result, torch.Tensor)
    assert result.shape == (1, 1, 8, 6)
    assert result.unique().tolist() == [1.0]


def test_prepare_a_batch_of_masks() -> None:
    assert prepare_images(torch.ones(5, 8, 6), channels=1)[0].shape == (1, 8, 6)
    assert len(prepare_images(torch.ones(5, 8, 6), channels=1)) == 5
    assert len(prepare_images(np.ones((5, 8, 6)), channels=1)) == 5


def test_prepare_clamps_the_overshoot_of_resizing() -> None:
    result = prepare_images(torch.full((3, 8, 8), 1.05))
    assert isinstance(result, torch.Tensor)
    assert result.max() == 1.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "image is an empty list"),
        (None, "image holds NoneType"),
        ("cat.png", "image holds str.*open_image opens files"),
        ([np.zeros((8, 8, 3)), torch.zeros(3, 8, 8)], "image holds Tensor, ndarray"),
        (np.zeros((8, 8)), r"image has the shape \(8, 8\); needed is \[N, H, W, C\]"),
        (np.zeros((3, 8, 8)), r"needed is .* with C = 3"),
        (np.zeros((8, 8, 4)), r"shape \(8, 8, 4\)"),
        (torch.zeros(8, 8, 3), r"needed is \[N, C, H, W\] or \[C, H, W\] with C = 3"),
        (torch.zeros(1, 1, 8, 8), r"shape \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 1, 8, 8), r"shape \(1, 3, 1, 8, 8\)"),
        (torch.zeros(3, 0, 8), r"shape \(3, 0, 8\)"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)], r"different sizes \(3, 8, 8\), \(3, 8, 16\)"),
        (torch.full((3, 8, 8), float("nan")), "NaN or infinite"),
        (np.full((8, 8, 3), np.inf), "NaN or infinite"),
        (np.full((8, 8, 3), 200.0), "from 200 to 200.*Divide by 255, or give uint8"),
        (torch.full((3, 8, 8), -3.0), "from -3 to -3"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "type torch.int64"),
        (np.zeros((8, 8, 3), dtype=np.int32), "type int32"),
        (np.zeros((8, 8, 3), dtype=complex), "type complex128"),
        (np.zeros((8, 8, 3), dtype=np.uint16), "type uint16"),
    ],
)
def test_prepare_refuses(images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_images(images)  # type: ignore[arg-type]


# Saving.


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_save_keeps_metadata(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    metadata = {"prompt": 'a "cat" — 猫 🐈\nline', "seed": "7", "negative_prompt": ""}
    save_image(gradient(), path, metadata)
    assert read_metadata(path) == metadata
    opened = open_image(path)
    assert opened.size == (9, 6)
    if suffix != ".jpg" and suffix != ".jpeg":
        assert opened.tobytes() == gradient().tobytes()


def test_save_without_metadata(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg", ".webp"):
        save_image(gradient(), tmp_path / f"out{suffix}")
        assert read_metadata(tmp_path / f"out{suffix}") == {}


def test_read_metadata_of_a_foreign_comment(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0hello"
    gradient().save(tmp_path / "photo.jpg", exif=exif)
    assert read_metadata(tmp_path / "photo.jpg") == {}


def test_save_stores_a_stand_in_for_characters_that_cannot_be_stored(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg", ".webp"):
        save_image(gradient(), tmp_path / f"out{suffix}", {"prompt": "a\0b\udc80c"})
        assert read_metadata(tmp_path / f"out{suffix}") == {"prompt": "a\ufffdb\ufffdc"}


@pytest.mark.parametrize("name", ["out.tiff", "out", "out.png.txt"])
def test_save_refuses_unknown_suffixes(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the suffix .* one of \.png, \.jpg, \.jpeg, \.webp"):
        save_image(gradient(), tmp_path / name)
    with pytest.raises(ValueError, match="has the suffix"):
        image_format(name)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_transparency_in_jpeg_and_keeps_it_elsewhere(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    with pytest.raises(ValueError, match="JPEG cannot hold a picture of mode RGBA"):
        save_image(image, tmp_path / "out.jpg")
    for suffix in (".png", ".webp"):
        save_image(image, tmp_path / f"out{suffix}")
        with Image.open(tmp_path / f"out{suffix}") as stored:
            assert stored.convert("RGBA").getpixel((0, 0))[3] == 4


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    save_image(gradient(), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save_image(Image.new("F", (2, 2)), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
