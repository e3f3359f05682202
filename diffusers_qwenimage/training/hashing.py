"""Names for cached things: a hash of all that they depend on."""

import hashlib

import torch
from torch import Tensor


def digest_of(*parts: object) -> str:
    """SHA-256 (hex) of the parts; bytes as they are, others by `repr`. Order and borders count."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's type, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
    return digest_of(str(tensor.dtype), tuple(tensor.shape), raw)
