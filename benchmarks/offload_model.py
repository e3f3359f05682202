"""What the benchmarks of streaming share: the transformer in host memory, a guided step, device memory."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.offload.memory import HostSlab
from diffusers_qwenimage.transformer import Modulation

GIB = 2**30
TEXT_TOKENS = (128, 10)
STEPS = 3  # timed together


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and on what.

    Attributes:
        device: where the model computes.
        blocks, width: of the transformer; width in multiples of 128 (24 in the published model).
        side: of the picture in pixels.
        repeats: groups of steps that are timed.
    """

    device: torch.device
    blocks: int
    width: int
    side: int
    repeats: int


@torch.no_grad()
def host_model(setting: Setting) -> QwenImageTransformer2DModel:
    """The transformer in ordinary host memory, N(0, 0.02), norms 1: drawn on the device, block by block."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config_of(setting)).to(torch.bfloat16)
    model.pos_embed = type(model.pos_embed)((16, 56, 56))
    generator = torch.Generator(setting.device).manual_seed(0)
    staging = torch.empty(2**28, dtype=torch.uint8, pin_memory=setting.device.type == "cuda")
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            drawn = torch.empty(parameter.shape, dtype=torch.bfloat16, device=setting.device)
            if isinstance(owner, nn.Linear):
                drawn.normal_(0, 0.02, generator=generator)
            else:
                drawn.fill_(1)
            value = on_host(drawn, staging)
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model.eval()


def on_host(drawn: Tensor, staging: Tensor) -> Tensor:
    """A copy in ordinary host memory, in large pages and through pinned memory: much faster than `.cpu()`."""
    if drawn.device.type != "cuda":
        return drawn
    value = HostSlab(drawn.nbytes, how="registered").tensor
    value.copy_(staging[: drawn.nbytes].copy_(drawn.flatten().view(torch.uint8)))
    return value.view(drawn.dtype).view(drawn.shape)


def config_of(setting: Setting) -> dict[str, Any]:
    """Of the published model, but for the size."""
    return {"num_layers": setting.blocks, "num_attention_heads": setting.width}


def inputs_of(setting: Setting) -> tuple[Tensor, list[Tensor], Tensor, list[list[tuple[int, int, int]]]]:
    """Packed latents of both branches, their texts, the timestep and the shapes."""
    grid = setting.side // 16
    generator = torch.Generator(setting.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device, dtype=torch.bfloat16, generator=generator)

    image = torch.cat([random(1, grid * grid, 64)] * 2)
    text = [random(tokens, 3584) for tokens in TEXT_TOKENS]
    timestep = torch.full((2,), 0.5, device=setting.device, dtype=torch.bfloat16)
    return image, text, timestep, [[(1, grid, grid)]] * 2


@torch.no_grad()
def guided_step(model: QwenImageTransformer2DModel, setting: Setting) -> Callable[[], Tensor]:
    """A function that computes both velocities; the modulation is drawn, since its values cost nothing."""
    image, text, timestep, shapes = inputs_of(setting)
    generator = torch.Generator(setting.device).manual_seed(2)
    six = 6 * model.inner_dim

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=setting.device, dtype=torch.bfloat16, generator=generator)
        return values * 0.1

    modulation = Modulation(image=drawn(setting.blocks, 1, six), text=drawn(setting.blocks, six))

    @torch.no_grad()
    def step() -> Tensor:
        velocities: Tensor = model(
            hidden_states=image,
            encoder_hidden_states=text,
            timestep=timestep,
            img_shapes=shapes,
            return_dict=False,
            modulation=modulation,
        )[0]
        return velocities

    return step


@contextmanager
def pinned_in_place(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module's weights pinned where they lie, storage by storage; small ones stay as they are."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in module.parameters()
    }
    large = [item for item in storages.items() if device.type == "cuda" and item[1].nbytes() >= 2**20]

    def pin(item: tuple[int, Any]) -> None:
        address, storage = item
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, storage.nbytes(), 0)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pin, large))
    try:
        yield
    finally:
        synchronize(device)
        for address, _ in large:
            torch.cuda.cudart().cudaHostUnregister(address)


def timed(function: Callable[[], object], device: torch.device, steps: int = STEPS) -> float:
    """Milliseconds of one of several calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        function()
    synchronize(device)
    return (time.perf_counter() - start) * 1000 / steps


def cap(device: torch.device, budget: float | None) -> None:
    """Let the process take no more than `budget` GiB from the device; None: all of it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if budget is None else min(1.0, budget * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give what the allocator keeps back, and the workspaces of cuBLAS in streams that were used before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Forget the peak of the device's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peaks(device: torch.device) -> tuple[int, int]:
    """Most bytes allocated, and most reserved, since the last reset."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def beside_allocator(device: torch.device) -> float:
    """GiB in use on the device beside what the allocator has: CUDA's context, libraries and kernels."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return float((total - free - torch.cuda.memory_reserved(device)) / GIB)


def resident_memory() -> float:
    """GiB of host memory that the process holds."""
    return float(psutil.Process().memory_info().rss / GIB)
