"""`TrainConfig` from a command line and a YAML or TOML file; the command line wins."""

import argparse
import ast
import difflib
import inspect
import json
import logging
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .config import TrainConfig

logger = logging.getLogger(__name__)

# Flags of DiffSynth-Studio's scripts that have nothing to set here: how they are parsed, and why.
WITHOUT_EFFECT: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "find_unused_parameters": ({"action": "store_true"}, "weights without a gradient are always found"),
    "dataset_num_workers": ({"metavar": "N"}, "latents and embeddings are read from the cache"),
    "task": ({"choices": ["sft"]}, "there is no other task"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and an option per field of `TrainConfig`; those not given stay out of the result."""
    parser.add_argument(
        "--config", metavar="FILE", default=None, help="YAML or TOML file with any of these options"
    )
    help_texts, sections = field_docs(), field_sections()
    types = get_type_hints(TrainConfig)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(sections.values())}
    for field in fields(TrainConfig):
        text = help_texts[field.name] + _default_text(field)
        _add_option(groups[sections[field.name]], field, types[field.name], text.replace("%", "%%"))
    for name, (settings, _) in WITHOUT_EFFECT.items():
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)


def read_config(arguments: argparse.Namespace) -> TrainConfig:
    """The checked config of a parsed command line and the file it names.

    Raises:
        ValueError: for unknown or missing options and values that do not fit.
        FileNotFoundError: if the file does not exist.
    """
    for name, (_, reason) in WITHOUT_EFFECT.items():
        if hasattr(arguments, name):
            logger.warning("--%s has no effect: %s.", name, reason)
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(TrainConfig)
        if hasattr(arguments, field.name)
    }
    return make_config({**(read_file(Path(arguments.config)) if arguments.config else {}), **given})


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """The checked config of option values, as a YAML file may hold them (numbers as text, lists as lists).

    Raises:
        ValueError: for unknown or missing options and values that do not fit.
    """
    types = get_type_hints(TrainConfig)
    for name in values:
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            raise ValueError(f"Unknown option {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}")
    missing = [f.name for f in fields(TrainConfig) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"The option {missing[0]} is missing; give --{missing[0]}.")
    config = TrainConfig(**{name: _convert(name, types[name], value) for name, value in values.items()})
    config.check()
    return config


def read_file(path: Path) -> dict[str, Any]:
    """The options in a YAML (.yaml, .yml, .json) or TOML (.toml) file.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it cannot be parsed, or is no table of options.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The config file {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = _parse_toml(text) if path.suffix == ".toml" else _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold options, one `name: value` a line.")
    return values


def field_docs() -> dict[str, str]:
    """The text under each field of `TrainConfig`."""
    body = ast.parse(textwrap.dedent(inspect.getsource(TrainConfig))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def field_sections() -> dict[str, str]:
    """The section of `TrainConfig` that each field stands in: the last `# --- title ---` above it."""
    sections, title = {}, ""
    for line in inspect.getsource(TrainConfig).splitlines():
        if match := re.fullmatch(r"    # --- (.+) ---", line):
            title = match[1]
        elif match := re.match(r"    (\w+): ", line):
            sections[match[1]] = title
    return {field.name: sections[field.name] for field in fields(TrainConfig)}


def _parse_toml(text: str) -> Any:
    if find_spec("tomllib") is None:
        raise ValueError("TOML needs Python 3.11; write the file as YAML.")
    return import_module("tomllib").loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _default_text(field: "Field[Any]") -> str:
    """What the help adds; texts that state their default themselves, and those without one, get nothing."""
    if isinstance(field.default, bool) or field.default in (MISSING, None, "", ()):
        return ""
    return f" (default: {field.default})"


def _add_option(parser: "argparse._ArgumentGroup", field: "Field[Any]", kind: Any, text: str) -> None:
    kind, flag = _without_none(kind), f"--{field.name}"
    if kind is bool and field.default is True:
        parser.add_argument(
            f"--no_{field.name}",
            dest=field.name,
            action="store_false",
            default=argparse.SUPPRESS,
            help=f"Switches this off: {text}",
        )
    elif kind is bool:
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
    else:
        settings: dict[str, Any] = {"nargs": "+"} if get_origin(kind) is tuple else {}
        if get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        else:
            settings["metavar"] = _metavar(kind)
            settings["type"] = _argument_type(field.name, kind)
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **settings)


def _metavar(kind: Any) -> str:
    base = _without_none(kind)
    return {int: "N", float: "X"}.get(base, "TEXT")


def _argument_type(name: str, kind: Any) -> Callable[[str], Any]:
    """A converter with the message of `_convert`."""
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind

    def convert(text: str) -> Any:
        try:
            return _convert(name, item, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _without_none(kind: Any) -> Any:
    arguments = [part for part in get_args(kind) if part is not NoneType]
    return arguments[0] if NoneType in get_args(kind) else kind


def _convert(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type of the field `name`."""
    if value is None and NoneType in get_args(kind):
        return None
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{name} must be a list of texts, got {value!r}.")
        return tuple(items)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        return value
    if kind is str:
        return _text(name, value)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}.")
        return value
    return _number(name, kind, value)


def _text(name: str, value: Any) -> str:
    """A text; a list or table of a config file where the command line takes JSON or commas."""
    if isinstance(value, str):
        return value
    if name in ("model_paths", "optimizer_args"):
        return json.dumps(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    raise ValueError(f"{name} must be a text, got {value!r}.")


def _number(name: str, kind: type, value: Any) -> Any:
    """A number; text too, since YAML reads 1e-4 as one."""
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
        raise ValueError(f"{name} must be {what}, got {value!r}.")
    try:
        number = kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {what}, got {value!r}.") from error
    if number != number:
        raise ValueError(f"{name} must be {what}, got {value!r}.")
    return number
