"""What CUDA has on a device beside PyTorch's tensors: its context, libraries and kernels.

Libraries come with their first call and kernels with their first launch, so it grows until a whole picture
was made: on an H100 from 0.51 GiB to 0.68 with libraries loaded, and to 0.81. `load_libraries` makes the
first calls, so that this much can be measured before anything is planned; `LATER_BYTES` is kept for the rest.
"""

from functools import lru_cache

import torch
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from diffusers_qwenimage.kernels.matmul import linear_gelu_now

GIB = 2**30
MOST_CONTEXT = GIB  # other processes cannot be told apart from it
LATER_BYTES = 192 * 2**20  # kernels of other sizes, Triton's, page tables of pinned memory: measured 136 MiB
WIDTH, HEADS, ROWS, CHANNELS = 3072, 24, 256, 384  # of the published model: libraries choose kernels by size


def context_bytes(device: torch.device) -> int:
    """Memory in use on a device beside PyTorch's, now; what other processes have counts, up to a limit."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, min(total - free - torch.cuda.memory_reserved(device), MOST_CONTEXT))


def expected_context_bytes(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> int:
    """The same when a picture was made: what is there with all libraries loaded, and an allowance."""
    if device.type != "cuda":
        return 0
    load_libraries(device, dtype)
    return max(_with_libraries(device) + LATER_BYTES, context_bytes(device))


def measured_peak(device: torch.device) -> int | None:
    """The most memory that this process has had on a device, its context included; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) + context_bytes(device)


@lru_cache(maxsize=8)
@torch.no_grad()
def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Let cuBLAS and cuDNN load what pictures need, by small calls, once per process: 50 MB for a moment."""
    rows = torch.zeros(ROWS, WIDTH, device=device, dtype=dtype)
    weight = torch.zeros(WIDTH, WIDTH, device=device, dtype=dtype)
    linear_gelu_now(linear(rows, weight, rows[0]), weight, rows[0], triton=True)
    heads = rows.view(1, ROWS, HEADS, WIDTH // HEADS).transpose(1, 2)
    scaled_dot_product_attention(heads, heads, heads)
    picture = torch.zeros(1, CHANNELS, 32, 32, device=device, dtype=dtype)
    kernel = torch.zeros(CHANNELS, CHANNELS, 3, 3, device=device, dtype=dtype)
    nhwc = torch.channels_last
    conv2d(picture.contiguous(memory_format=nhwc), kernel.contiguous(memory_format=nhwc), padding=1)
    torch.cuda.synchronize(device)
    del rows, weight, heads, picture, kernel
    torch.cuda.empty_cache()


@lru_cache(maxsize=8)
def _with_libraries(device: torch.device) -> int:
    """Measured once: what comes later is in the allowance already."""
    return context_bytes(device)
