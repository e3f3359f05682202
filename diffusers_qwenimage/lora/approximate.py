"""The nearest low-rank factors of a matrix (Eckart and Young 1936), by a randomised range finder.

Halko, Martinsson and Tropp 2011, algorithm 4.4: project on random directions, sharpen by power iterations,
and take the exact decomposition of the small matrix. No column is centred and no singular value clamped.
"""

import torch
from torch import Tensor

from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.updates import LoraUpdate

NUM_OVERSAMPLES = 16
NUM_POWER_ITERATIONS = 4


def low_rank(update: LoraUpdate, rank: int) -> tuple[Tensor, Tensor]:
    """(up [out, rank], down [rank, in]) in fp32, nearest to a LoKr, LoHa or full difference, its scale
    included."""
    return truncated_svd(delta_weight(update).float(), rank)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [out, rank], down [rank, in]) whose product is the best approximation of a matrix, fp32.

    The singular values are shared evenly between the factors. The result does not depend on torch's random
    state.
    """
    num_directions = min(rank + NUM_OVERSAMPLES, *matrix.shape)
    if 2 * num_directions >= min(matrix.shape):
        parts = torch.linalg.svd(matrix.double(), full_matrices=False)
        left, values, right = (part.float() for part in parts)
    else:
        generator = torch.Generator(device=matrix.device).manual_seed(0)
        directions = torch.randn(
            matrix.shape[1], num_directions, generator=generator, device=matrix.device, dtype=matrix.dtype
        )
        basis = torch.linalg.qr(matrix @ directions).Q
        for _ in range(NUM_POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        small, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ small
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()
