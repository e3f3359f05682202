"""Whether a model fits a machine, and how it is placed there: for `generate` and `env`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
WORKING_MEMORY = 8 * GIB  # beside the weights on a GPU, for decoding a picture of 1328x1328 on the plain path


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How the weights are placed.

    Attributes:
        managed: within a budget of device memory; else everything is on the device.
        vram_limit: the budget in GiB; None is all that is free.
        weights: kind of 8-bit weights of the transformer; None for none.
        text: what to tell the user.
    """

    managed: bool
    vram_limit: float | None
    weights: str | None
    text: str


def choose_placement(
    source: str | Path,
    dtype: "torch.dtype",
    device: "torch.device",
    *,
    vram: float | None,
    weights: str | None,
    insists: bool,
) -> Placement:
    """How to place a model of this size.

    Args:
        vram: the budget that the user gave, in GiB.
        weights: the 8-bit weights that the user asked for.
        insists: whether the user named the device.

    Raises:
        ValueError: if it does not fit.
        FileNotFoundError, DownloadError: if its size cannot be told.
    """
    import torch

    from diffusers_qwenimage.loading.sizes import describe_sizes, weight_sizes

    sizes = weight_sizes(source, dtype)
    total = sum(sizes.values())
    loading = f"Loading {source}: {describe_sizes(sizes)}"
    if vram is not None or weights is not None:
        return Placement(managed=True, vram_limit=vram, weights=weights, text=loading)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if total + WORKING_MEMORY <= free:
            return Placement(managed=False, vram_limit=None, weights=None, text=loading)
        text = f"{loading}; {free / GIB:.1f} GiB are free on {device}, so what does not fit streams"
        return Placement(managed=True, vram_limit=None, weights=None, text=text)
    if device.type == "cpu" and total > host_bytes():
        problem = (
            f"{source} has {describe_sizes(sizes)}, this machine {host_bytes() / GIB:.0f} GiB of memory and "
            "no GPU in use (`qwenimage env` says why)"
        )
        if not insists:
            raise ValueError(
                f"{problem}. With an NVIDIA GPU of 4 GB or more, --vram makes it fit; --device cpu reads the "
                "weights from the disk in every step, which takes hours; without --model, a small model "
                "inside this package draws simple shapes."
            )
        return Placement(
            managed=False, vram_limit=None, weights=None, text=f"{problem}. It will be very slow."
        )
    return Placement(managed=False, vram_limit=None, weights=None, text=loading)


def host_bytes() -> int:
    """Memory of the machine, or of the container that we are in."""
    import psutil

    limit = int(psutil.virtual_memory().total)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else ""
        limit = min(limit, int(text)) if text.isdigit() else limit
    return limit
