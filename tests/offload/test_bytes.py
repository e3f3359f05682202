"""Every tensor that is alive on the device in a step, added up: within what a plan says."""

import gc

import components
import pytest
import torch
from fused_cases import needs_triton
from offload_cases import limit_of, run, transformer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_qwenimage import kernels
from diffusers_qwenimage.offload import stream
from diffusers_qwenimage.offload.state import state_of
from diffusers_qwenimage.pipelines.needs import (
    FRUGAL_SAMPLE_WIDTHS,
    FRUGAL_STREAM_WIDTHS,
    FUSED_DENOISE_WIDTHS,
)

pytestmark = needs_triton  # plain references make tensors in fp32 that the kernels do not
ROWS, COLUMNS, TEXT = 6, 10, (5, 3)
CONFIG = {"num_attention_heads": 8, "num_layers": 2}


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive; the most of them.

    What torch's own kernels take inside of an operation is not seen.
    """

    def __init__(self, known, expected):
        super().__init__()
        self._expected = expected
        self._known = {_key(tensor): None for tensor in known}
        self._sizes = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key = _key(tensor)
                if key not in self._known and key not in self._sizes:
                    storage = tensor.untyped_storage()
                    self._sizes[key] = (StorageWeakRef(storage), storage.nbytes())
        now = self._now()
        if now > self._expected:
            gc.collect()  # Triton's interpreter keeps arguments in cycles
            now = self._now()
        self.most = max(self.most, now)
        return result

    def _now(self):
        self._sizes = {key: pair for key, pair in self._sizes.items() if not pair[0].expired()}
        return sum(size for _, size in self._sizes.values())


def _key(tensor):
    return tensor.untyped_storage()._cdata


def inputs_of(dtype):
    inputs = components.transformer_inputs([(1, ROWS, COLUMNS)], len(TEXT))
    inputs["encoder_hidden_states"] = [components.random(n, components.WIDTH, seed=n) for n in TEXT]
    for key, value in inputs.items():
        if isinstance(value, list) and torch.is_tensor(value[0]):
            inputs[key] = [item.to(dtype) for item in value]
        elif torch.is_tensor(value):
            inputs[key] = value.to(dtype)
    return inputs


def most_alive(model, inputs, table, expected):
    """The most bytes that a step has alive beside weights and inputs."""
    run(model, {**inputs, "modulation": table})  # caches of tables and row numbers
    slots = [slot.memory for slot in state_of(model).slots]
    gc.collect()
    gc.freeze()  # of what is alive now nothing has to be looked at again and again
    try:
        with Alive([*model.parameters(), *model.buffers(), *slots], expected) as alive:
            run(model, {**inputs, "modulation": table})
    finally:
        gc.unfreeze()
    return alive.most


@pytest.mark.parametrize("split", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_takes_what_is_planned(split):
    dtype = torch.bfloat16
    model, inputs = transformer(dtype, **CONFIG), inputs_of(dtype)
    table = model.tabulate_modulation(torch.tensor([0.5]), dtype=dtype).at(0)
    plan = stream(model, device="cpu", vram_limit=limit_of(model, 0.0, split=split), split=split)
    assert plan.is_split == split and plan.streamed_bytes
    tokens = ROWS * COLUMNS + max(TEXT)
    one = tokens * model.inner_dim * dtype.itemsize
    widths = {
        True: len(TEXT) * FRUGAL_STREAM_WIDTHS + FRUGAL_SAMPLE_WIDTHS,
        False: len(TEXT) * FUSED_DENOISE_WIDTHS,
    }
    with kernels.use_backend("triton"):
        for frugal in (True, False):
            model.save_memory(frugal)
            expected = widths[frugal] * one  # what plans of pipelines count with
            taken = most_alive(model, inputs, table, expected)
            assert 0.4 * expected < taken <= expected
