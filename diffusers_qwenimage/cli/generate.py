"""`qwenimage generate`: a prompt, perhaps with a picture and a mask, to picture files."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .generate_options import Lora, Request, add_options, read_request

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diffusers_qwenimage.loading import Components

# Bytes kept free beside the weights on a GPU, for decoding a picture of 1328x1328.
WORKING_MEMORY = 8 * 2**30


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
    from diffusers_qwenimage.loading import default_checkpoint, load_components

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device, embedded=arguments.model is None)
    if arguments.model is None:
        _say(
            "Using the small model inside this package, which draws simple shapes "
            "(--model Qwen/Qwen-Image is the full one)."
        )
    else:
        _say(f"Loading {arguments.model} ...")
    source = default_checkpoint() if arguments.model is None else arguments.model
    model = "embedded" if arguments.model is None else str(arguments.model)
    try:
        components = load_components(source, dtype=dtype)
        apply_loras(components.transformer, request.loras)
        pipeline = build_pipeline(components, request, device)
        for index, path in enumerate(request.outputs):
            _say(f"Seed {request.seed + index}")
            picture = make_picture(pipeline, request, index)
            save_image(picture, path, request.metadata(index, model, str(dtype).removeprefix("torch.")))
            print(path, flush=True)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The memory of {device} does not suffice for {request.width}x{request.height} pixels; "
            "lower --size, or take --dtype bfloat16."
        ) from error
    return 0


def build_pipeline(components: "Components", request: Request, device: "torch.device") -> Any:
    """The pipeline for the task, on the device; part by part if a GPU cannot hold all (model offloading)."""
    from diffusers_qwenimage import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline

    kind = QwenImagePipeline
    if request.image is not None:
        kind = QwenImageImg2ImgPipeline if request.mask is None else QwenImageInpaintPipeline
    pipeline = kind(**vars(components))
    if device.type == "cuda" and not fits(components, device):
        _say(f"The weights do not fit {device} at once: its parts are moved there in turns.")
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
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
    """The device of `--device`; "auto" is an NVIDIA GPU if there is one, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
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


def fits(components: "Components", device: "torch.device") -> bool:
    """Whether all weights fit the free memory of a GPU, beside what a picture needs."""
    import torch

    modules = (components.text_encoder, components.transformer, components.vae)
    weights = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    return bool(weights + WORKING_MEMORY <= free)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
