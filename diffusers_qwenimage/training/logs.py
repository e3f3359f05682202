"""What a run leaves to look at: log.csv, loss.png, the pictures of validations, a model card."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from PIL import Image, ImageDraw

from diffusers_qwenimage.files import write_text
from diffusers_qwenimage.images import save_image

from .config import TrainConfig, comma_list

LOG, CURVE, SAMPLES = "log.csv", "loss.png", "samples"
CURVE_SIZE = (900, 420)
CURVE_MARGIN = 50
CAPTION_HEIGHT = 16  # pixels of a line of text over a grid


def check_loggers(config: TrainConfig) -> None:
    """Refuse loggers that are not installed.

    Raises:
        ValueError: naming the package.
    """
    for name in comma_list(config.loggers):
        if find_spec(name) is None:
            raise ValueError(f"The logger {name} needs its package: pip install {name}.")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer step; `skipped` says why it changed nothing, or is empty."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    skipped: str = ""


class RunLog:
    """log.csv of a run: appended to as steps are done. A resumed run first drops the rows that it repeats."""

    def __init__(self, output: Path, *, done: int) -> None:
        self.path = output / LOG
        self.records = [record for record in read_log(self.path) if record.step <= done]
        rows = [_header(), *(_row(record) for record in self.records)]
        write_text(self.path, "".join(rows))

    def add(self, record: Record) -> None:
        """Add a row, on the disk at once."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_row(record))

    def draw(self) -> None:
        """Draw the loss curve beside the log."""
        kept = [record for record in self.records if math.isfinite(record.loss)]
        if len(kept) > 1:
            save_image(loss_curve(kept), self.path.with_name(CURVE))


def read_log(path: Path) -> list[Record]:
    """The rows of a log.csv; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
        if any(value is None for value in row.values()):
            break
        records.append(
            Record(
                step=int(row["step"]),
                epoch=int(row["epoch"]),
                loss=float(row["loss"]),
                learning_rate=float(row["learning_rate"]),
                grad_norm=float(row["grad_norm"]),
                seconds=float(row["seconds"]),
                skipped=row["skipped"],
            )
        )
    return records


def loss_curve(records: Sequence[Record]) -> Image.Image:
    """The loss over the steps: every value in light grey, their moving average in blue."""
    width, height = CURVE_SIZE
    picture = Image.new("RGB", CURVE_SIZE, "white")
    draw = ImageDraw.Draw(picture)
    losses = [record.loss for record in records]
    top = max(losses) or 1.0
    steps = [record.step for record in records]

    def place(step: float, loss: float) -> tuple[float, float]:
        x = CURVE_MARGIN + (step - steps[0]) / max(1, steps[-1] - steps[0]) * (width - 2 * CURVE_MARGIN)
        return x, height - CURVE_MARGIN - loss / top * (height - 2 * CURVE_MARGIN)

    for part in range(5):
        loss = top * part / 4
        y = place(steps[0], loss)[1]
        draw.line([(CURVE_MARGIN, y), (width - CURVE_MARGIN, y)], fill=(225, 225, 225))
        draw.text((4, y - 6), f"{loss:.3g}", fill="black")
    draw.text((CURVE_MARGIN, height - CURVE_MARGIN + 8), f"step {steps[0]}", fill="black")
    draw.text((width - CURVE_MARGIN - 60, height - CURVE_MARGIN + 8), f"step {steps[-1]}", fill="black")
    draw.line([place(s, v) for s, v in zip(steps, losses, strict=True)], fill=(190, 190, 190))
    smooth = _moving_average(losses, max(1, len(losses) // 20))
    draw.line([place(s, v) for s, v in zip(steps, smooth, strict=True)], fill=(30, 80, 200), width=2)
    draw.text((CURVE_MARGIN, 8), f"loss; moving average, last value {smooth[-1]:.4g}", fill="black")
    return picture


def picture_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Rows of pictures of one size, each under its name; the texts of `columns` on top."""
    side_x, side_y = rows[0][1][0].size
    line = side_y + CAPTION_HEIGHT
    grid = Image.new("RGB", (side_x * len(columns), CAPTION_HEIGHT + line * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for column, text in enumerate(columns):
        draw.text((column * side_x + 2, 2), _short(text, side_x), fill="black")
    for index, (name, pictures) in enumerate(rows):
        top = CAPTION_HEIGHT + index * line
        draw.text((2, top + 2), name, fill="black")
        for column, picture in enumerate(pictures):
            grid.paste(picture, (column * side_x, top + CAPTION_HEIGHT))
    return grid


def describe(config: TrainConfig, *, base: str, device: str, images: int, steps: int, per_step: int) -> str:
    """What a run trains, in one line."""
    what = ", ".join(config.trained_models)
    if config.is_lora:
        what = f"a {config.adapter} of rank {config.lora_rank} for the {what}"
    return (
        f"Training {what} of {base} on {device} in {config.dtype}: {images} pictures, {steps} steps of "
        f"{per_step}."
    )


def write_card(output: Path, config: TrainConfig, *, base: str, weights: str, step: int, images: int) -> None:
    """README.md of the output folder: what was trained, on what, with which settings, and how to load it."""
    kind = f"{config.adapter} of rank {config.lora_rank}" if config.is_lora else "fine-tuned model"
    call = (
        f'pipe.load_lora_weights("{weights}")'
        if config.is_lora
        else f'# transformer="{weights}" in load_components, or ModelConfig(path="{weights}")'
    )
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    changed = {name: value for name, value in asdict(config).items() if value != defaults[name]}
    settings = yaml.safe_dump(
        {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    )
    pictures = (output / SAMPLES).glob("step-*.png")
    sample = sorted(pictures, key=lambda path: path.stat().st_mtime)[-1:]
    shown = f"![validation pictures]({SAMPLES}/{sample[0].name})\n\n" if sample else ""
    head: dict[str, object] = (
        {"base_model": base} if base.count("/") == 1 and not base.startswith((".", "/")) else {}
    )
    head |= {"tags": ["text-to-image", "qwen-image", *(["lora"] if config.is_lora else [])]}
    write_text(
        output / "README.md",
        f"---\n{yaml.safe_dump(head)}---\n\n# {output.resolve().name}\n\n"
        f"A {kind} for {base}, after {step} steps on {images} pictures. Weights: `{weights}`.\n\n{shown}"
        f"```python\n{call}\n```\n\n## Settings\n\n```yaml\n{settings}```\n",
    )


def _header() -> str:
    return ",".join(field.name for field in fields(Record)) + "\n"


def _row(record: Record) -> str:
    """Floats by `repr`, so that they are read back exactly."""
    values = [getattr(record, field.name) for field in fields(Record)]
    return ",".join(value if isinstance(value, str) else repr(value) for value in values) + "\n"


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    averages = []
    for index in range(len(values)):
        part = values[max(0, index - width + 1) : index + 1]
        averages.append(sum(part) / len(part))
    return averages


def _short(text: str, width: int) -> str:
    """Text that fits into `width` pixels, at 6 a letter."""
    plain = text.encode("ascii", "replace").decode()
    limit = max(4, width // 6)
    return plain if len(plain) <= limit else f"{plain[: limit - 3]}..."
