"""`qwenimage generate`: a prompt, perhaps with a picture and a mask, to picture files."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generate_options import SIDE, Lora, Request, add_options, read_request
from .placement import Placement, choose_placement

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `qwenimage`."""
    parser = subparsers.add_parser(
        "generate",
        help="make pictures from a prompt",
        description="Make pictures from a prompt; with --init-image change a picture, with --mask only a "
        "part of it. The settings are written into the files.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the pictures and print their paths.

    Raises:
        ValueError: for arguments or files that cannot be used.
        OSError: if files cannot be read, downloaded or written.
    """
    request = read_request(
        arguments
    )  # before the slow imports and the loading, so that mistakes show at once
    import torch

    from diffusers_qwenimage.images import save_image
    from diffusers_qwenimage.loading import default_checkpoint

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device, embedded=arguments.model is None)
    if arguments.model is None:
        _say(
            "Using the small model inside this package, which draws simple shapes "
            "(--model Qwen/Qwen-Image is the full one)."
        )
    source = default_checkpoint() if arguments.model is None else arguments.model
    model = "embedded" if arguments.model is None else str(arguments.model)
    try:
        placement = choose_placement(
            source,
            dtype,
            device,
            vram=arguments.vram,
            weights=arguments.weights,
            insists=arguments.device != "auto",
        )
        if arguments.model is not None:
            _say(placement.text)
        pipeline = build_pipeline(source, request, dtype, device, placement)
        for index, path in enumerate(request.outputs):
            _say(f"Seed {request.seed + index}")
            picture = make_picture(pipeline, request, index)
            save_image(picture, path, request.metadata(index, model, str(dtype).removeprefix("torch.")))
            print(path, flush=True)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The memory of {device} does not suffice for {request.width}x{request.height} pixels; lower "
            "--size, give --vram less than is free, or take --weights fp8."
        ) from error
    return 0


def build_pipeline(
    source: str | Path, request: Request, dtype: "torch.dtype", device: "torch.device", placement: Placement
) -> Any:
    """The pipeline for the task, its weights placed."""
    from diffusers_qwenimage import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline
    from diffusers_qwenimage.loading import load_components
    from diffusers_qwenimage.pipelines.needs import Demand

    kind = QwenImagePipeline
    if request.image is not None:
        kind = QwenImageImg2ImgPipeline if request.mask is None else QwenImageInpaintPipeline
    if not placement.managed:
        pipeline = kind(**vars(load_components(source, dtype=dtype)))
        apply_loras(pipeline.transformer, request.loras)
        pipeline.to(device)
        return pipeline
    pipeline = kind.from_pretrained_in_place(
        str(source),
        vram_limit=placement.vram_limit,
        weights=placement.weights,
        device=device,
        dtype=dtype,
        demand=Demand(
            rows=request.height // SIDE,
            columns=request.width // SIDE,
            guided=request.negative_prompt is not None,
            steps=request.steps,
        ),
    )
    apply_loras(pipeline.transformer, request.loras)
    _say(str(pipeline.memory_report()))
    return pipeline


def apply_loras(transformer: Any, loras: Sequence[Lora]) -> None:
    """Apply them one after the other, and say what each has changed."""
    from diffusers_qwenimage.pipelines.adapters import attach_lora, describe, open_lora

    for lora in loras:
        file = open_lora(lora.source)
        attach_lora(transformer, file, strength=lora.strength)
        layers = len({update.module for update in file.updates if update.component == "transformer"})
        _say(f"LoRA {lora.source}: {layers} layers changed at strength {lora.strength:g} ({describe(file)})")


def make_picture(pipeline: Any, request: Request, index: int) -> "Image":
    """Picture number `index` of the request."""
    import torch

    pictures = {} if request.image is None else {"image": request.image, "strength": request.strength}
    if request.mask is not None:
        pictures["mask_image"] = request.mask
    count = len(request.outputs)
    pipeline.set_progress_bar_config(desc="Denoising" if count == 1 else f"Picture {index + 1} of {count}")
    result = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.cfg,
        num_inference_steps=request.steps,
        width=request.width,
        height=request.height,
        generator=torch.Generator("cpu").manual_seed(request.seed + index),  # the same on every device
        **pictures,
    )
    picture: Image = result.images[0]
    return picture


def choose_device(name: str) -> "torch.device":
    """The device of `--device`; "auto" is an NVIDIA GPU if there is one, else the CPU.

    Raises:
        ValueError: if it cannot be used; the message says why.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        if reason.startswith("Expected one of"):  # torch goes on with thirty names
            reason = "there is none of this name; take cpu, cuda, cuda:1 or mps"
        raise ValueError(f"The device {name!r} cannot be used: {reason}. See `qwenimage env`.") from error
    if device.type == "meta":
        raise ValueError("The device 'meta' holds no values; take cpu or cuda.")
    return device


def choose_dtype(name: str, device: "torch.device", *, embedded: bool) -> "torch.dtype":
    """The type of `--dtype`; "auto" is bfloat16, but float32 for the embedded model on a CPU."""
    import torch

    if name == "auto":
        name = "float32" if embedded and device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
