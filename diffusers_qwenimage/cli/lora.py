"""`qwenimage lora`: look into LoRA files, convert, compare, merge, resize, extract, bake and repair them.

Exit codes: 0 done or exactly equal, 1 the files differ, 2 refused or bad input (one line on stderr says why).
"""

import argparse
from importlib import import_module

from diffusers_qwenimage.cli.lora_tools import add_tools

COMMANDS_MODULE = "diffusers_qwenimage.cli.lora_commands"
# Written out so that --help need not import torch; a test holds them equal to the targets of the library.
TARGET_NAMES = (
    "opensource",
    "diffsynth",
    "diffsynth-bare",
    "diffusers",
    "peft",
    "comfyui",
    "kohya",
    "nunchaku",
)
OTHER_NAMES = ("portable", "musubi", "nunchaku-fused", "comfy")

Subparsers = argparse._SubParsersAction


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add `lora` and its commands to a command line."""
    parser = subparsers.add_parser(
        "lora",
        help="inspect, convert, compare, merge, resize, extract, bake and repair LoRA files",
        description="Look into LoRA files of Qwen-Image, convert them between formats, and work with them.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_compare(commands)
    add_tools(commands, _add, (*TARGET_NAMES, *OTHER_NAMES))


def run(arguments: argparse.Namespace) -> int:
    """Run a parsed command; returns the exit code."""
    code: int = getattr(import_module(arguments.module), arguments.function)(arguments)
    return code


def _add_convert(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    parser = _add(commands, "convert", "write a file in another format, proved equal")
    parser.add_argument("input", help=".safetensors file or PEFT adapter folder")
    parser.add_argument("output", help="file to write; a folder for --to peft")
    parser.add_argument(
        "--to",
        required=True,
        choices=(*TARGET_NAMES, *OTHER_NAMES, "original"),
        metavar="TARGET",
        help=f"one of {', '.join(TARGET_NAMES)}; portable, comfy and musubi are other names of opensource, "
        "comfyui and kohya; original undoes a conversion byte by byte",
    )
    parser.add_argument("--strict", action="store_true", help="only bit-identical tensors under new names")
    parser.add_argument(
        "--allow-approximate",
        action="store_true",
        help="round a scale or cut a rank where there is no exact way; the error is printed",
    )
    parser.add_argument("--max-rank", type=int, default=128, help="rank of an approximation (default 128)")
    parser.add_argument(
        "--drop-text-encoder",
        action="store_true",
        help="leave out updates of the text encoder where the target cannot hold them",
    )
    parser.add_argument("--base", metavar="CHECKPOINT", help="check the shapes against this file or folder")


def _add_compare(commands: "Subparsers[argparse.ArgumentParser]") -> None:
    for name, text in (
        ("verify", "prove that two files change the weights alike"),
        ("diff", "list the modules that two files change differently"),
    ):
        parser = _add(commands, name, text)
        parser.add_argument("first", help=".safetensors file or PEFT adapter folder")
        parser.add_argument("second", help="the file to compare with it")
        parser.add_argument(
            "--tolerance",
            type=float,
            default=0.0,
            help="largest relative difference of a weight change that passes (default 0)",
        )


def _add(
    commands: "Subparsers[argparse.ArgumentParser]", name: str, text: str, module: str = COMMANDS_MODULE
) -> argparse.ArgumentParser:
    """Add a command that is the function of its name in a module, which is imported when it runs."""
    parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="write the result as JSON to stdout")
    parser.set_defaults(run=run, module=module, function=name)
    return parser
