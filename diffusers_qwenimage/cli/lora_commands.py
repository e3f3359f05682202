"""What the commands of `qwenimage lora` do; `cli/lora.py` holds their parsers."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from diffusers_qwenimage.lora.convert import Conversion, convert_lora
from diffusers_qwenimage.lora.read import read_lora
from diffusers_qwenimage.lora.render import Options
from diffusers_qwenimage.lora.verify import Comparison, compare_files, worst

EXIT_DONE, EXIT_DIFFERS, EXIT_REFUSED = 0, 1, 2
NUM_WORST = 20  # modules that `diff` lists


def convert(arguments: argparse.Namespace) -> int:
    """Convert a file and print what was done and proved."""
    options = Options(
        strict=arguments.strict,
        allow_approximate=arguments.allow_approximate,
        max_rank=arguments.max_rank,
        drop_text_encoder=arguments.drop_text_encoder,
    )
    with progress_bar("convert and verify", 2 * num_bytes(arguments.input)) as progress:
        conversion = convert_lora(
            arguments.input,
            arguments.output,
            arguments.to,
            options=options,
            base=arguments.base,
            progress=progress,
        )
    write_result(arguments, _conversion_json(conversion), _conversion_lines(conversion, arguments.output))
    return EXIT_DONE


def verify(arguments: argparse.Namespace) -> int:
    """Compare two files and print the bound."""
    comparison = _compared(arguments)
    write_result(arguments, _comparison_json(comparison), [comparison.summary()])
    return EXIT_DONE if comparison.bound <= arguments.tolerance else EXIT_DIFFERS


def diff(arguments: argparse.Namespace) -> int:
    """Compare two files and list the modules that differ most."""
    comparison = _compared(arguments)
    listed = worst(comparison, NUM_WORST)
    lines = [f"{m.bound:9.2e}  {m.module}{'  ' + m.note if m.note else ''}" for m in listed]
    data = {**_comparison_json(comparison), "modules": [asdict(m) for m in comparison.modules if not m.exact]}
    write_result(arguments, data, [*lines, comparison.summary()])
    return EXIT_DONE if comparison.bound <= arguments.tolerance else EXIT_DIFFERS


def _compared(arguments: argparse.Namespace) -> Comparison:
    first, second = read_lora(arguments.first), read_lora(arguments.second)
    with progress_bar("compare", num_bytes(arguments.first)) as progress:
        return compare_files(first, second, progress=progress)


def _conversion_json(conversion: Conversion) -> dict[str, object]:
    return {
        "target": conversion.target,
        "restored": conversion.restored,
        "actions": _actions(conversion),
        "num_bytes": conversion.num_bytes,
        "notes": list(conversion.notes),
        **_comparison_json(conversion.comparison),
    }


def _conversion_lines(conversion: Conversion, output: Path) -> list[str]:
    if conversion.restored:
        done = "the original, byte by byte (SHA-256 checked)"
    else:
        done = ", ".join(f"{number} {action}" for action, number in _actions(conversion).items())
    return [
        f"{output}: {conversion.target}, {conversion.num_bytes / 2**20:.1f} MiB; {done}",
        *(f"note: {note}" for note in conversion.notes),
        conversion.comparison.summary(),
    ]


def _actions(conversion: Conversion) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in conversion.steps:
        counts[step.action] = counts.get(step.action, 0) + 1
    return counts


def _comparison_json(comparison: Comparison) -> dict[str, object]:
    bound = comparison.bound
    return {
        "exact": comparison.exact,
        "same_bits": comparison.same_bits,
        "bound": bound if bound != float("inf") else "inf",
        "num_exact": comparison.num_exact,
        "num_changes": len(comparison.modules),
        "summary": comparison.summary(),
    }


def num_bytes(path: str | Path) -> int:
    """Bytes of the weights, for the progress bar; 0 if there is no such file (reading will say so)."""
    path = Path(path)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, only where somebody watches and the file is large enough to wait for."""
    with tqdm(
        desc=text,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=1,
        disable=None,
        leave=False,
    ) as bar:

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        yield advance


def write_result(arguments: argparse.Namespace, data: object, lines: Sequence[str]) -> None:
    """Write a command's result to stdout: `data` as JSON with --json, else the lines."""
    text = json.dumps(data, indent=2) if arguments.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
