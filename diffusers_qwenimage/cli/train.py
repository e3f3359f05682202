"""`qwenimage train`: LoRA and full fine-tuning, with DiffSynth-Studio's flags."""

import argparse

from diffusers_qwenimage.training.options import add_options, read_config


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `qwenimage`."""
    parser = subparsers.add_parser(
        "train",
        help="train a LoRA or the whole model",
        usage="qwenimage train --dataset_base_path FOLDER (--lora_base_model dit | --trainable_models dit) "
        "[--config FILE] [options]",
        description="Train a LoRA or the whole model on pictures with captions. Steps are optimizer steps. "
        "Start it with `accelerate launch` for several GPUs.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train.

    Raises:
        ValueError: for options or data that cannot be used.
        OSError: if files cannot be read, downloaded or written.
    """
    config = read_config(arguments)  # before the slow imports, so that mistakes show at once
    from diffusers_qwenimage.training.trainer import train

    train(config)
    return 0
