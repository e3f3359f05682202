"""Whether weights are stored as a module uses them, so that they can be used from where they are."""

from collections.abc import Sequence

import torch
from torch import nn

from diffusers_qwenimage.checkpoint.reader import DTYPES
from diffusers_qwenimage.checkpoint.scaled import ScaledCheckpoint

from .empty import is_quantised, wanted_type
from .plan import Placement
from .survey import Group


def is_as_used(module: nn.Module, name: str, dtype: torch.dtype | None, *, is_scaled: bool) -> bool:
    """Whether a tensor stored as `dtype` (None: an unknown one) is what the module holds under this name."""
    if dtype is None or is_scaled or is_quantised(module, name):
        return False
    return dtype == wanted_type(module, name) or not dtype.is_floating_point


def in_files_as_used(module: nn.Module, groups: Sequence[Group], scaled: ScaledCheckpoint) -> bool:
    """Whether all of these tensors are in files, as they are used."""
    for key in (member.key for group in groups for member in group):
        stored = scaled.weights.tensors.get(key)
        if stored is None or stored.value is not None or key in scaled.rotations:
            return False
        if not is_as_used(module, key, DTYPES.get(stored.entry.dtype), is_scaled=key in scaled.scales):
            return False
    return True


def check_as_used(placement: Placement, scaled: ScaledCheckpoint) -> None:
    """Weights that stay in the file must be of the module's type there.

    Raises:
        ValueError: if one is not.
    """
    for groups in placement.streamed:
        for member in (member for group in groups for member in group):
            stored = scaled.weights.tensors.get(member.key)
            dtype = stored and DTYPES.get(stored.entry.dtype)
            if member.key in scaled.scales or dtype != member.tensor.dtype:
                raise ValueError(
                    f"{member.key} is stored as {stored.entry.dtype if stored else 'nothing'} and needed "
                    f"as {member.tensor.dtype}: it cannot be used from the mapped file as it is. Take "
                    'source="pinned", or a checkpoint of that type.'
                )
