"""LoRA in pipelines: every format that `lora/` reads, PEFT underneath, and no silent failure.

`QwenImageLoraMixin` keeps the API of diffusers' mixin. What differs: any format loads; a file of which
anything does not match the model raises `ValueError` (diffusers loads what matches and warns, or loads
nothing); the scale comes from wherever the file keeps it; on a base whose weights are stored in fp8 the
adapter computes in the compute type; what is saved states its scale.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import QwenImageLoraLoaderMixin
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffusers_qwenimage.lora.apply import PREFIX
from diffusers_qwenimage.lora.formats import DIFFUSERS
from diffusers_qwenimage.lora.metadata import peft_config
from diffusers_qwenimage.lora.read import read_state_dict
from diffusers_qwenimage.lora.scales import METADATA_KEY
from diffusers_qwenimage.lora.sources import Access

from .adapters import Source, attach_lora, describe, open_lora, peft_adapter


class QwenImageLoraMixin(QwenImageLoraLoaderMixin):
    """LoRA methods of the pipelines: `load_lora_weights`, `save_lora_weights`, and diffusers' `set_adapters`,
    `fuse_lora`, `unfuse_lora`, `unload_lora_weights`, `delete_adapters`, `enable_lora_hotswap`."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Source,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> None:
        """Add a LoRA to the transformer as an adapter.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder (also one of PEFT), `"ORG/NAME"`,
                `"modelscope:ORG/NAME/FILE.safetensors"`, or a state dict; in any format.
            adapter_name: its name; "default_0", "default_1", ... if None.
            hotswap: replace the adapter of that name in place (same ranks, or `enable_lora_hotswap` before).
            weight_name, subfolder: the file in a folder or repository, where there are several.
            revision: branch, tag or commit of a repository.
            local_files_only: make no request.
            token, cache_dir, force_download: for Hugging Face, where they differ from the client's settings.
            use_safetensors: only safetensors are read; False is refused.
            low_cpu_mem_usage: do not initialise weights that are about to be overwritten.

        Raises:
            ValueError: if the file is not understood, does not fit the transformer, or changes nothing in it.
        """
        file = open_lora(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            local_files_only=local_files_only,
            access=_access(token, cache_dir, force_download, use_safetensors),
        )
        attach_lora(
            self.transformer,
            file,
            adapter_name=adapter_name,
            hotswap=hotswap,
            pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: Source,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        return_lora_metadata: bool = False,
    ) -> Any:
        """The state dict of a LoRA under diffusers' keys, and its configuration if that is asked for."""
        adapter = peft_adapter(
            open_lora(
                pretrained_model_name_or_path_or_dict,
                weight_name=weight_name,
                subfolder=subfolder,
                revision=revision,
                local_files_only=local_files_only,
                access=_access(token, cache_dir, force_download, use_safetensors),
            )
        )
        return (adapter.state_dict, adapter.metadata) if return_lora_metadata else adapter.state_dict

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
        *,
        adapter_name: str | None = None,
    ) -> None:
        """Save an adapter as diffusers does, always with the configuration that states its scale.

        Args:
            transformer_lora_layers: the transformer with the adapter, or its state dict (PEFT's
                `get_peft_model_state_dict`).
            transformer_lora_adapter_metadata: fields of the `LoraConfig`; needed with a state dict whose
                alpha differs from its rank, since the tensors do not tell.
            adapter_name: which adapter of a transformer that has several.

        Raises:
            ValueError: if there are no layers, they are not a LoRA, or the configuration contradicts them.
        """
        if not safe_serialization:
            raise ValueError("Adapters are saved as safetensors only; a pickle can run code when it is read.")
        if not transformer_lora_layers:
            raise ValueError("Nothing to save: give transformer_lora_layers.")
        state, given = transformer_lora_layers, transformer_lora_adapter_metadata
        if isinstance(state, nn.Module):
            state, given = _state_of(state, adapter_name)
        layers = {f"{PREFIX}.{key.removeprefix(f'{PREFIX}.')}": tensor for key, tensor in state.items()}
        config = _truthful_config(layers, given)
        cls.write_lora_layers(
            state_dict=layers,
            save_directory=str(save_directory),
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=True,
            lora_adapter_metadata={f"{PREFIX}.{field}": value for field, value in config.items()},
        )


def _access(
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    force_download: bool,
    use_safetensors: bool | None,
) -> Access:
    if use_safetensors is False:
        raise ValueError("Only safetensors are read; a pickle can run code. Leave use_safetensors out.")
    folder = None if cache_dir is None else Path(cache_dir)
    return Access(token=token, cache_dir=folder, force_download=force_download)


def _state_of(transformer: Any, name: str | None) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Tensors and configuration of an adapter in a transformer."""
    names = list(getattr(transformer, "peft_config", {}))
    if name is None and len(names) == 1:
        name = names[0]
    if name is None or name not in names:
        raise ValueError(f"Say with adapter_name which one to save: {', '.join(names) or 'there is none'}.")
    state = get_peft_model_state_dict(transformer, adapter_name=name)
    return state, transformer.peft_config[name].to_dict()


def _truthful_config(layers: Mapping[str, Tensor], given: Mapping[str, Any] | None) -> dict[str, object]:
    """The minimal configuration that gives the tensors the scale that `given` means (without it: 1)."""
    metadata = {}
    if given is not None:
        wanted = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        fields = {f"{PREFIX}.{key}": given[key] for key in wanted if key in given}
        metadata = {METADATA_KEY: json.dumps(fields)}
    file = read_state_dict(layers, metadata=metadata, name="the adapter")
    foreign = [key for key in file.formats if key != DIFFUSERS.name]
    if foreign or any(update.kind not in ("lora", "dora", "embedding") for update in file.updates):
        raise ValueError(f"Only LoRA layers under PEFT's names can be saved so, got {describe(file)}.")
    return peft_config(file.updates, rounding=True)
