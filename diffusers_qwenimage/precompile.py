"""Kernels compiled before they are called, several at a time; libraries loaded by small first calls.

Triton compiles a variant of a kernel when it is called for the first time on a machine, with a compiler, an
assembler and, in some of its versions, a C compiler as processes of their own: a third of a second to two
for each, one after the other. Which variants a model will call is known from its configuration, so they are
compiled in threads beside each other, those of the autoencoder while the transformer works.

A call that comes before its variant is ready compiles it itself; nothing depends on this but time.
"""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch

from .graphs import ModelCall, forward
from .kernels import backend
from .transformer import QwenImageTransformer2DModel
from .vae import AutoencoderKLQwenImage

if TYPE_CHECKING:
    from .kernels.launch import Variant

logger = logging.getLogger(__name__)

THREADS = 8  # most of a variant's time passes in processes or without Python's lock
THREADS_BESIDE = 2  # where this thread goes on launching kernels: more would keep it from the lock
_STARTED: dict[tuple[torch.device, "Variant"], "Future[None]"] = {}


def compile_both(transformer: Any, vae: Any, device: torch.device) -> "list[Future[None]]":
    """Start compiling what both call on a device, the transformer's first."""
    return [*compile_transformer(transformer, device), *compile_autoencoder(vae, device)]


def compile_transformer(model: Any, device: torch.device) -> "list[Future[None]]":
    """Start compiling what the transformer's fused path calls on a device, where nothing is quantised."""
    if not isinstance(model, QwenImageTransformer2DModel) or not _compiles(device):
        return []
    from .kernels import norm, rope

    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    return _start(
        [*norm.variants(heads * head_dim, model.dtype), *rope.variants(heads, head_dim, model.dtype)], device
    )


def compile_autoencoder(vae: Any, device: torch.device) -> "list[Future[None]]":
    """Start compiling what the autoencoder's fused path calls on a device, for encoding and decoding."""
    if not isinstance(vae, AutoencoderKLQwenImage) or vae.dtype.itemsize > 2 or not _compiles(device):
        return []
    from .kernels import vae_attention, vae_norm

    widths = sorted({vae.config.base_dim * factor for factor in vae.config.dim_mult}, reverse=True)
    return _start(
        [*vae_attention.variants(widths[0], vae.dtype), *vae_norm.variants(widths, vae.dtype)],
        device,
        threads=THREADS_BESIDE,
    )


def finish(compiling: "Iterable[Future[None]]") -> None:
    """Wait until these are compiled; what failed fails again, and is reported, when it is called."""
    futures = list(compiling)
    wait(futures)
    for future in futures:
        if error := future.exception():
            logger.info("A kernel was not compiled ahead: %s", error)


@torch.no_grad()
def call_once(transformer: QwenImageTransformer2DModel, vae: Any) -> None:
    """A guided step of a tiny picture, and its decoding: what libraries load and models lay out at first.

    Nothing is done with the result. The autoencoder is left out where it is on another device.
    """
    device, dtype, config = transformer.img_in.weight.device, transformer.dtype, transformer.config
    kind = torch.zeros(1, dtype=torch.long, device=device) if config.use_additional_t_cond else None
    table = transformer.tabulate_modulation(
        torch.ones(1, device=device, dtype=dtype), dtype=dtype, additional_t_cond=kind
    )
    side = 4
    lengths = (8, 4)
    call = ModelCall(
        hidden_states=torch.zeros(len(lengths), side * side, config.in_channels, device=device, dtype=dtype),
        text=[torch.zeros(n, config.joint_attention_dim, device=device, dtype=dtype) for n in lengths],
        timestep=torch.ones(len(lengths), device=device, dtype=dtype),
        image_shapes=[(1, side, side)],
        kind=None if kind is None else kind.expand(len(lengths)),
        modulation=table.at(0),
    )
    forward(transformer, call)
    if isinstance(vae, AutoencoderKLQwenImage) and vae.device == device:
        vae.decode(torch.zeros(1, vae.config.z_dim, 1, 2 * side, 2 * side, device=device, dtype=vae.dtype))


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda" and backend(device).name == "triton"


def _start(
    variants: "Sequence[Variant]", device: torch.device, *, threads: int = THREADS
) -> "list[Future[None]]":
    """One job for each variant that was not started before on the device."""
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    missing = [variant for variant in variants if (device, variant) not in _STARTED]
    if missing:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="compile-kernels")
        for variant in missing:
            _STARTED[device, variant] = pool.submit(_compile, variant, device)
        pool.shutdown(wait=False)
    return [_STARTED[device, variant] for variant in variants]


def _compile(variant: "Variant", device: torch.device) -> None:
    with torch.cuda.device(device):
        variant.compile()
