"""Weights on disk: safetensors files -> named tensors -> a component, whatever the layout of the files.

    checkpoint = open_checkpoint(files)              # headers only, checked
    parts = find_components(checkpoint)              # recognised by their keys, in the module's own key names
    config = infer_config("transformer", parts["transformer"])
    assign_weights(module_on_meta, parts["transformer"], dtype=torch.bfloat16, device="cuda")

`read_component` does the first three steps for one component. Tensors are memory-mapped and go to their
module one by one, so a 41 GB checkpoint is never held twice.
"""

from .assign import assign_weights, empty_module, load_transformer_file, read_weights
from .config import infer_config, sidecar_config
from .reader import Checkpoint, from_tensors, open_checkpoint, shard_problem, weight_files
from .recognise import ComponentName, find_components, read_component

__all__ = [
    "Checkpoint",
    "ComponentName",
    "assign_weights",
    "empty_module",
    "find_components",
    "from_tensors",
    "infer_config",
    "load_transformer_file",
    "open_checkpoint",
    "read_component",
    "read_weights",
    "shard_problem",
    "sidecar_config",
    "weight_files",
]
