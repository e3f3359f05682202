"""What is launched directly, and what is left to Triton; GPU tests of the kernels test the launch itself."""

from types import SimpleNamespace

import pytest
import torch
from fused_cases import needs_triton

from diffusers_qwenimage.kernels import launch

RUN = {
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
}


def compiled(**changes):
    run = SimpleNamespace(**{**RUN, "launch": "C function", **changes})
    return SimpleNamespace(run=run, function=7, packed_metadata=(4, 1, 0))


def test_the_c_function_is_called_with_what_its_wrapper_would_give():
    settings = ((4, 1, 0), None, None, None)
    assert launch._launch_of(compiled()) == ("C function", 7, (False, False, None, None, *settings))
    needing_memory = compiled(global_scratch_size=64)
    assert launch._launch_of(needing_memory) == (needing_memory.run, 7, settings)


@pytest.mark.parametrize("missing", [*RUN, "launch"])
def test_changed_classes_of_triton_are_left_to_triton(missing):
    changed = compiled()
    delattr(changed.run, missing)
    assert launch._launch_of(changed) is None
    assert launch._launch_of(SimpleNamespace()) is None


@needs_triton
def test_why_triton_launches(monkeypatch):
    kernel = SimpleNamespace(device_caches={})
    monkeypatch.setattr(launch.triton, "__version__", "3.6.1")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", object(), raising=False)
    assert launch._why_not_direct(kernel) is None
    assert "interpreted" in launch._why_not_direct(SimpleNamespace())
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    assert "stream" in launch._why_not_direct(kernel)
    monkeypatch.setattr(launch.triton, "__version__", "9.0.0")
    assert "9.0 was not checked" in launch._why_not_direct(kernel)
