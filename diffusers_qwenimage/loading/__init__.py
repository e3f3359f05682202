"""Where weights come from: Hub id, ModelScope id, folder, single file, shards -> components."""

from .components import (
    Components,
    default_checkpoint,
    load_components,
    load_scheduler,
    load_text_encoder,
    load_transformer,
    load_vae,
    model_folder,
)
from .hubs import DownloadError, Hub
from .sources import find_files
from .tokenizer import check_tokenizer, load_tokenizer

__all__ = [
    "Components",
    "DownloadError",
    "Hub",
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
]
