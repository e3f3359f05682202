"""Settings of the whole suite."""

import os
from importlib.util import find_spec

import torch
from hypothesis import settings

# Parallel workers share the cores: one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
# Where there is no GPU, Triton's kernels run in its interpreter. It must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, and no failure because the machine is slow. For new ones, as long as you like:
# pytest --hypothesis-profile=default tests/lora
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


def read_scalars_of_the_interpreter():
    """Triton's interpreter keeps a scalar as an array of one element, of which numpy 2.4 makes no int.

    Loops up to a number that a kernel is given need it.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_read(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_read


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    read_scalars_of_the_interpreter()
