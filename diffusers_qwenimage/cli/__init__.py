"""The command line: `qwenimage generate | train | lora | env`.

A subcommand is a module of this folder with `add_parser(subparsers)`, which adds its parser and sets `run`, a
function of the parsed arguments that returns the exit code. A module imports what is heavy inside `run`, so
that `--help` is quick.

Exit codes: 0 done; 2 the arguments or their files are not usable (one line on stderr); 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from diffusers_qwenimage.version import __version__

COMMANDS = ("generate", "train", "lora", "environment")  # module names, in the order of the help


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing its usage and leaving."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse, but the parser of a command speaks up itself about what it does not know."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [name.split("=")[0] for name in unknown if name.startswith("-")]
            near = [
                match for name in names for match in get_close_matches(name, self._option_string_actions, 1)
            ]
            hint = f"; did you mean {' '.join(near)}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Raise; `main` prints the message."""
        if message.endswith("required: COMMAND"):
            message = f"name a command: {', '.join(self._commands())}"
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _commands(self) -> list[str]:
        choices = [action.choices for action in self._actions if action.dest == argparse.SUPPRESS]
        return [name for names in choices for name in names or ()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, of `argv` or of the process, and return its exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        with log_to_stderr(verbose=arguments.verbose):
            code: int = arguments.run(arguments)
            return code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"qwenimage: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="qwenimage",
        description="Make pictures with Qwen-Image, and look after its files.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qwenimage {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help="say more while working, and where an error came from"
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        if find_spec(f"{__name__}.{name}"):
            import_module(f"{__name__}.{name}").add_parser(subparsers)
    return parser


@contextmanager
def log_to_stderr(*, verbose: bool) -> Iterator[None]:
    """Show the package's warnings, and if `verbose` all it says and where an error came from."""
    logger = logging.getLogger("diffusers_qwenimage")
    level, handler = logger.level, logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    except (ValueError, OSError):
        logger.info("Where the error came from:", exc_info=True)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
