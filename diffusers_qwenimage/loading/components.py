"""Files -> the components of a pipeline. Weights go straight to modules built without memory, as views of the
memory-mapped files where neither type nor device changes."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_qwenimage.checkpoint import Checkpoint, assign_weights, empty_module, read_component
from diffusers_qwenimage.files import read_header
from diffusers_qwenimage.transformer import QwenImageTransformer2DModel
from diffusers_qwenimage.vae import AutoencoderKLQwenImage

from .hubs import Hub
from .sources import check_id, find_files
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

Files = str | Path | Sequence[str | Path]

MODEL_INDEX = "model_index.json"
MODELSCOPE_PREFIX = "modelscope:"
WEIGHT_FOLDERS = ("text_encoder", "transformer", "vae")
# Settings of the published models; `FlowMatchEulerDiscreteScheduler` has others as defaults.
PUBLISHED_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of a Qwen-Image pipeline, under the names of its constructor's arguments."""

    scheduler: Any
    vae: AutoencoderKLQwenImage
    text_encoder: Any
    tokenizer: Any
    transformer: QwenImageTransformer2DModel


def load_components(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    transformer: Files | None = None,
    hub: Hub = "huggingface",
    revision: str | None = None,
    local_only: bool = False,
) -> Components:
    """All components of a model in diffusers' layout.

    Args:
        source: a folder, a model id ("Qwen/Qwen-Image"), or "modelscope:ORG/NAME".
        dtype: of the weights of all modules.
        device: where the modules go.
        transformer: file(s) to take the transformer from instead, as a single ComfyUI file.
        hub: where an id is looked up; the prefix of `source` wins.
        revision: branch, tag or commit of an id.
        local_only: make no request.

    Raises:
        FileNotFoundError: if a file is missing.
        DownloadError: if a hub cannot deliver.
        ValueError: if the source is not a Qwen-Image model, or files do not fit together.
    """
    folder = model_folder(
        source, hub=hub, revision=revision, local_only=local_only, skip_transformer=transformer is not None
    )
    check_index(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    text_encoder = load_text_encoder(folder / "text_encoder", dtype=dtype, device=device)
    num_rows = text_encoder.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, but the text encoder only {num_rows:,} "
            "embeddings; they belong to different models."
        )
    return Components(
        scheduler=load_scheduler(folder / "scheduler"),
        vae=load_vae(folder / "vae", dtype=dtype, device=device),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=load_transformer(transformer or folder / "transformer", dtype=dtype, device=device),
    )


def load_transformer(
    files: Checkpoint | Files,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
) -> QwenImageTransformer2DModel:
    """The transformer of a file, shards or folder; keys of diffusers, ComfyUI or DiffSynth; (scaled) fp8 too.

    `config` None: the `config.json` beside the file, else what the shapes say.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the files hold something else, or do not fit the config.
    """
    model, part = open_transformer(files, config=config)
    assign_weights(model, part, dtype=dtype, device=device)
    return model


def load_vae(
    files: Checkpoint | Files,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
) -> AutoencoderKLQwenImage:
    """The VAE of a file or folder; arguments and errors as of `load_transformer`."""
    settings, part = read_component(files, "vae", config=config)
    model = empty_module(lambda: cast("AutoencoderKLQwenImage", AutoencoderKLQwenImage.from_config(settings)))
    assign_weights(model, part, dtype=dtype, device=device)
    model.eval()
    return model


def load_text_encoder(
    files: Checkpoint | Files,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
) -> Any:
    """The text encoder, Qwen2.5-VL; arguments and errors as of `load_transformer`.

    Keys of published files (transformers 4) and of the module (transformers 5) both load. The module is
    complete, with vision tower and `lm_head`, so that it can be saved; text prompts run neither of them.
    """
    model, part = open_text_encoder(files, config=config)
    assign_weights(model, part, dtype=dtype, device=device)
    return state_dtype(model)


def open_transformer(
    files: Checkpoint | Files, *, config: Mapping[str, Any] | None = None
) -> tuple[QwenImageTransformer2DModel, Checkpoint]:
    """The transformer on the meta device, and its weights in the files; errors as of `load_transformer`."""
    settings, part = read_component(files, "transformer", config=config)
    model = empty_module(
        lambda: cast("QwenImageTransformer2DModel", QwenImageTransformer2DModel.from_config(settings))
    )
    model.eval()
    return model, part


def open_text_encoder(
    files: Checkpoint | Files, *, config: Mapping[str, Any] | None = None
) -> tuple[Any, Checkpoint]:
    """The text encoder on the meta device, and its weights in the files; errors as of `load_transformer`."""
    settings, part = read_component(files, "text_encoder", config=config)
    model = empty_module(lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)))
    return model.eval(), part


def state_dtype(text_encoder: Any) -> Any:
    """Let the configs of a text encoder state the type of its weights, as transformers does; returns it."""
    config = text_encoder.config
    for described in (config, config.text_config, config.vision_config):
        described.dtype = text_encoder.dtype
    return text_encoder


def load_scheduler(folder: str | Path | None = None) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a folder; None gives the published settings.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    if folder is None:
        return FlowMatchEulerDiscreteScheduler.from_config(PUBLISHED_SCHEDULER)
    if not (Path(folder) / "scheduler_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no scheduler_config.json. Take the model's folder scheduler/."
        )
    return FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder), local_files_only=True)


def default_checkpoint() -> Path:
    """The folder of the small trained model inside the package.

    Raises:
        FileNotFoundError: if the package was installed without it.
    """
    folder = Path(__file__).parents[1] / "assets" / "tiny"
    if not (folder / MODEL_INDEX).is_file():
        raise FileNotFoundError(f"The embedded model is not in {folder}; reinstall the package.")
    return folder


def model_folder(
    source: str | Path,
    *,
    hub: Hub = "huggingface",
    revision: str | None = None,
    local_only: bool = False,
    skip_transformer: bool = False,
) -> Path:
    """The folder of a whole model, downloaded if need be; arguments and errors as of `load_components`."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file() or path.suffix == ".safetensors":
        raise ValueError(
            f"{source} is a single file, not a whole model. Give a model folder or id as the source and the "
            "file as its transformer."
        )
    model_id = str(source)
    if model_id.startswith(MODELSCOPE_PREFIX):
        model_id, hub = model_id.removeprefix(MODELSCOPE_PREFIX), "modelscope"
    folders = [name for name in WEIGHT_FOLDERS if not (skip_transformer and name == "transformer")]
    weights = [f"{name}/*.{suffix}" for name in folders for suffix in ("json", "safetensors")]
    patterns = [MODEL_INDEX, "scheduler/", "tokenizer/", *weights]
    files = find_files(model_id, patterns, hub=hub, revision=revision, local_only=local_only)
    return files[0].parent


def check_source(source: str | Path) -> None:
    """Say what is wrong with a folder or an id, before diffusers says it less clearly.

    Raises:
        FileNotFoundError: if the folder has no index.
        ValueError: if it is neither a folder nor like an id, or the folder holds a damaged weight file.
    """
    folder = Path(source)
    if not folder.is_dir():
        check_id(str(source))
        return
    _check_has_index(folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        read_header(file)


def check_index(folder: Path) -> None:
    """Refuse a folder that is not a Qwen-Image model in diffusers' layout.

    Raises:
        FileNotFoundError: if it has no index.
        ValueError: if the index is unreadable, or of another model.
    """
    path = folder / MODEL_INDEX
    _check_has_index(folder)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}). Fetch it again.") from error
    entry = index.get("transformer") if isinstance(index, dict) else None
    if not isinstance(entry, list) or entry[-1] != "QwenImageTransformer2DModel":
        raise ValueError(f"{path} describes another model: its transformer is {entry}, not of Qwen-Image.")


def _check_has_index(folder: Path) -> None:
    if not (folder / MODEL_INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} is not a model in diffusers' layout: it has no {MODEL_INDEX}. Give the folder that "
            "holds transformer/, vae/, text_encoder/ and tokenizer/."
        )
