"""Where weights come from: Hub id, ModelScope id, folder, single file, shards -> components.

Names are imported when they are first used: looking up a file needs no diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hubs import DownloadError, Hub
from .sources import find_files

if TYPE_CHECKING:
    from .components import (
        Components,
        check_index,
        check_source,
        default_checkpoint,
        load_components,
        load_scheduler,
        load_text_encoder,
        load_transformer,
        load_vae,
        model_folder,
        open_text_encoder,
        open_transformer,
        state_dtype,
    )
    from .tokenizer import check_tokenizer, load_tokenizer

__all__ = [
    "Components",
    "DownloadError",
    "Hub",
    "check_index",
    "check_source",
    "check_tokenizer",
    "default_checkpoint",
    "find_files",
    "load_components",
    "load_scheduler",
    "load_text_encoder",
    "load_tokenizer",
    "load_transformer",
    "load_vae",
    "model_folder",
    "open_text_encoder",
    "open_transformer",
    "state_dtype",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "tokenizer" if "tokenizer" in name else "components"
    return getattr(import_module(f"{__name__}.{module}"), name)
