"""Settings of the whole suite."""

import os

import torch

# Parallel workers share the cores: one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
