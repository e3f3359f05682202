"""The arguments of `qwenimage generate`: their parser, their checks, and what they ask for."""

import argparse
import json
import math
import re
import secrets
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_qwenimage.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 16  # pixels of a token on each axis; sizes are multiples of it
LATENT_PIXEL = 8  # picture pixels
MAX_SEED = 2**63 - 1
DTYPES = ("float32", "bfloat16", "float16")
MODEL_CONFIG = "transformer/config.json"  # of a model's folder


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model is run with when nothing else is asked for."""

    side: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA to apply: a file, folder or id on a hub, and its strength."""

    source: str
    strength: float


EMBEDDED = Defaults(side=256, steps=20)
PUBLISHED = Defaults(side=1024, steps=50)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the command with all defaults filled in; sizes in pixels."""

    prompt: str
    negative_prompt: str | None
    steps: int
    cfg: float
    seed: int
    width: int
    height: int
    image: "Image | None"
    mask: "Image | None"
    strength: float
    loras: list[Lora]
    outputs: list[Path]

    def metadata(self, index: int, model: str, dtype: str) -> dict[str, str]:
        """What is written into picture `index`: enough to make it again."""
        entries = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or "",
            "seed": str(self.seed + index),
            "steps": str(self.steps),
            "cfg": f"{self.cfg:g}",
            "size": f"{self.width}x{self.height}",
            "model": model,
            "dtype": dtype,
            "version": f"diffusers-qwenimage {__version__}",
        }
        if self.image is not None:
            entries["strength"] = f"{self.strength:g}"
        if self.loras:
            entries["lora"] = ", ".join(f"{lora.source}={lora.strength:g}" for lora in self.loras)
        return entries


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("prompt", help="what the picture shows")
    parser.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="a folder in diffusers' layout, a Hugging Face id such as Qwen/Qwen-Image, or "
        "modelscope:ORG/NAME; without it a small model inside this package draws simple shapes",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="FILE",
        help="file to write, .png, .jpg or .webp; an existing one is replaced "
        "(default: out.png; several: out-1.png, out-2.png, ...)",
    )
    _add_picture(parser.add_argument_group("the picture"))
    _add_start(parser.add_argument_group("a picture to start from"))
    _add_machine(parser.add_argument_group("weights and memory"))


def _add_picture(parser: "argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help='what to guide away from (default: "", which is guidance towards the prompt alone)',
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help=f"width and height in pixels, multiples of {SIDE} (default: "
        f"{PUBLISHED.side}x{PUBLISHED.side}, with the embedded model {EMBEDDED.side}x{EMBEDDED.side}; with "
        "--init-image as many pixels in its shape)",
    )
    parser.add_argument(
        "--steps",
        type=positive_integer,
        metavar="N",
        help=f"denoising steps (default: {PUBLISHED.steps}, with the embedded model {EMBEDDED.steps})",
    )
    parser.add_argument(
        "--cfg",
        type=scale,
        default=4.0,
        metavar="X",
        help="guidance scale; 1 is off and twice as fast (default: 4)",
    )
    parser.add_argument(
        "--seed", type=seed, metavar="N", help="same seed, same picture (default: drawn, and printed)"
    )
    parser.add_argument(
        "--num-images",
        type=positive_integer,
        default=1,
        metavar="N",
        help="pictures to make, with seeds counting up (default: 1)",
    )


def _add_start(parser: "argparse._ArgumentGroup") -> None:
    parser.add_argument("--init-image", metavar="FILE", help="a picture to start from; resized to --size")
    parser.add_argument(
        "--strength",
        type=share,
        metavar="X",
        help="with --init-image: how much may change, above 0 to 1 (default: 0.6)",
    )
    parser.add_argument(
        "--mask",
        metavar="FILE",
        help="with --init-image: white where it is repainted, black where it is kept; of the same size",
    )


def _add_machine(parser: "argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[=STRENGTH]",
        help="apply a LoRA of any known format: a file, ORG/NAME or modelscope:ORG/NAME, at a strength "
        "(default: 1); may be given several times",
    )
    parser.add_argument(
        "--vram",
        type=scale,
        metavar="GIB",
        help="stay within so many GiB of GPU memory, CUDA's own included: what does not fit streams from "
        "host memory; 0 is as little as can be (default: all that is free)",
    )
    parser.add_argument(
        "--weights",
        choices=("fp8", "int8", "fp8-storage"),
        help="keep the transformer in 8 bits: half the memory; pictures differ a little",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="type of the weights (default: auto, bfloat16, but float32 for the embedded model on a CPU)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps, ... (default: auto, an NVIDIA GPU if there is one)",
    )


def read_request(arguments: argparse.Namespace) -> Request:
    """Check the arguments against each other, open the pictures, and fill in defaults.

    Raises:
        ValueError: for arguments that contradict each other, and pictures or outputs that cannot be used.
    """
    from diffusers_qwenimage.images import image_format, open_image, open_mask

    defaults = defaults_of(arguments.model)
    if arguments.init_image is None and arguments.mask is not None:
        raise ValueError("--mask needs --init-image, the picture that is repainted.")
    if arguments.init_image is None and arguments.strength is not None:
        raise ValueError("--strength needs --init-image, the picture that is changed.")
    guided = arguments.cfg > 1
    if arguments.negative_prompt is not None and not guided:
        raise ValueError(f"--negative-prompt needs --cfg above 1, got {arguments.cfg:g}.")
    image_format(arguments.output)
    outputs = number_paths(arguments.output, arguments.num_images)
    for path in outputs:
        check_writable(path)
    image = None if arguments.init_image is None else open_image(arguments.init_image)
    mask = None if arguments.mask is None else open_mask(arguments.mask)
    if image is not None and mask is not None and image.size != mask.size:
        raise ValueError(
            f"The mask {arguments.mask} has {mask.width}x{mask.height} pixels, the picture "
            f"{arguments.init_image} {image.width}x{image.height}; make them the same size."
        )
    size = arguments.size or (
        (defaults.side,) * 2 if image is None else fit_area(image.size, defaults.side**2)
    )
    return Request(
        prompt=arguments.prompt,
        negative_prompt=(arguments.negative_prompt or "") if guided else None,
        steps=arguments.steps or defaults.steps,
        cfg=arguments.cfg,
        seed=secrets.randbelow(2**32) if arguments.seed is None else arguments.seed,
        width=size[0],
        height=size[1],
        image=image,
        mask=mask,
        strength=0.6 if arguments.strength is None else arguments.strength,
        loras=arguments.lora,
        outputs=outputs,
    )


def defaults_of(model: str | None) -> Defaults:
    """What a model is run with; the config in its folder may state the side of its pictures.

    Raises:
        ValueError: if that config is not readable.
    """
    if model is None:
        return EMBEDDED
    path = Path(model) / MODEL_CONFIG
    if not path.is_file():
        return PUBLISHED
    from diffusers_qwenimage.pipelines.sizes import SAMPLE_SIZE_FIELD

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}). Fetch it again.") from error
    side = config.get(SAMPLE_SIZE_FIELD) if isinstance(config, dict) else None
    return replace(PUBLISHED, side=side * LATENT_PIXEL) if isinstance(side, int) and side > 0 else PUBLISHED


def number_paths(path: Path, count: int) -> list[Path]:
    """`path` itself, or out-1.png, out-2.png, ... for more than one picture."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before any work is done."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file to write.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):  # permissions alone do not tell on every system
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: no file can be made in {parent}.") from error


def fit_area(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Width and height in the shape of `size` with about `area` pixels, in multiples of `SIDE`."""
    scale = (area / (size[0] * size[1])) ** 0.5
    width, height = (max(SIDE, round(side * scale / SIDE) * SIDE) for side in size)
    return width, height


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "WxH"."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1024x768")
    if len(match[1]) > 5 or len(match[2]) > 5:
        raise argparse.ArgumentTypeError(f"{text!r} is too large; this model draws about 1024x1024 pixels")
    width, height = int(match[1]), int(match[2])
    if not width or not height or width % SIDE or height % SIDE:
        near = "x".join(str(max(SIDE, round(side / SIDE) * SIDE)) for side in (width, height))
        raise argparse.ArgumentTypeError(
            f"{text} is not in multiples of {SIDE} pixels; the nearest is {near}"
        )
    return width, height


def positive_integer(text: str) -> int:
    """An integer of at least 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """An integer that a random generator takes."""
    if not re.fullmatch(r"\d{1,19}", text) or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}")
    return int(text)


def scale(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def lora(text: str) -> Lora:
    """A source and its strength, of "SOURCE" or "SOURCE=STRENGTH"; names with "=" in them stay whole."""
    source, separator, strength = text.rpartition("=")
    if not separator or Path(text).exists():
        source, strength = text, "1"
    try:
        value = float(strength)
    except ValueError:  # a mistyped strength, or a name with "=" in it, which has a suffix after that
        source, value = (text, 1.0) if "." in strength or "/" in strength else ("", 1.0)
    if not source or not math.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FILE or FILE=STRENGTH, such as style.safetensors=0.8"
        )
    return Lora(source=source, strength=value)


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value
