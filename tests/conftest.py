"""Settings of the whole suite."""

import os

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
