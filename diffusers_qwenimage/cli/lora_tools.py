"""Parsers of `qwenimage lora inspect | merge | resize | extract | bake | doctor`."""

import argparse
from collections.abc import Callable, Sequence

MODULE = "diffusers_qwenimage.cli.lora_tool_commands"
Subparsers = argparse._SubParsersAction
Commands = "Subparsers[argparse.ArgumentParser]"
Add = Callable[..., argparse.ArgumentParser]  # (commands, name, text, module) -> parser
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def add_tools(commands: "Subparsers[argparse.ArgumentParser]", add: Add, targets: Sequence[str]) -> None:
    """Add these commands; `add` makes a parser that runs the function of its name in a module."""
    _add_inspect(add(commands, "inspect", "say what a file holds and which programs load it", MODULE))
    _add_merge(add(commands, "merge", "add LoRAs with weights, exactly", MODULE), targets)
    _add_resize(add(commands, "resize", "give a LoRA another rank", MODULE), targets)
    _add_extract(
        add(commands, "extract", "take the difference of two checkpoints as a LoRA", MODULE), targets
    )
    _add_bake(add(commands, "bake", "write LoRAs into the weights of a checkpoint", MODULE))
    _add_doctor(add(commands, "doctor", "find known damage, and repair it into a new file", MODULE), targets)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        help="file, PEFT adapter folder, ORG/NAME/FILE.safetensors or modelscope:ORG/NAME/FILE.safetensors; "
        "of a remote file only the header is fetched",
    )


def _add_merge(parser: argparse.ArgumentParser, targets: Sequence[str]) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE[=WEIGHT]", help="LoRA files (weight 1 if none is given)"
    )
    _add_output(parser, targets)


def _add_resize(parser: argparse.ArgumentParser, targets: Sequence[str]) -> None:
    parser.add_argument("input", help=".safetensors file or PEFT adapter folder")
    _add_output(parser, targets)
    _add_rank(parser)
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="type of the new factors (default: that of the old ones)"
    )


def _add_extract(parser: argparse.ArgumentParser, targets: Sequence[str]) -> None:
    parser.add_argument("base", help="checkpoint before training: file, shard or folder")
    parser.add_argument("tuned", help="checkpoint after training")
    _add_output(parser, targets)
    _add_rank(parser)
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="bfloat16", help="type of the factors (default bfloat16)"
    )
    parser.add_argument(
        "--drop-others",
        action="store_true",
        help="leave out changes of biases, norms and embeddings, which only --to comfyui can hold",
    )


def _add_bake(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="transformer: file, or folder with its shards")
    parser.add_argument("inputs", nargs="+", metavar="LORA[=STRENGTH]", help="LoRA files")
    parser.add_argument("output", help="file or new folder to write")


def _add_doctor(parser: argparse.ArgumentParser, targets: Sequence[str]) -> None:
    parser.add_argument("input", help=".safetensors file or PEFT adapter folder")
    parser.add_argument(
        "output", nargs="?", help="file to write; without it, damage is only reported (exit 1)"
    )
    parser.add_argument("--to", metavar="TARGET", help=f"spelling of the output: {', '.join(targets)}")
    parser.add_argument(
        "--drop-unknown",
        action="store_true",
        help="leave out keys that no format knows instead of giving up",
    )


def _add_output(parser: argparse.ArgumentParser, targets: Sequence[str]) -> None:
    parser.add_argument("output", help="file to write; a folder for --to peft")
    parser.add_argument(
        "--to",
        default="opensource",
        metavar="TARGET",
        help=f"spelling of the output: {', '.join(targets)} (default opensource, which most programs read)",
    )


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="rank of every module, at most")
    parser.add_argument(
        "--energy", type=float, help="keep this share of the squared norm of each change, such as 0.99"
    )
    parser.add_argument(
        "--threshold", type=float, help="keep singular values of at least this share of the largest"
    )
