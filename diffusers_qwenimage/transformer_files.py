"""The transformer from files and into files: folders in 8 bits, single files of other programs."""

from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.modeling_utils import ModelMixin

if TYPE_CHECKING:
    from .transformer import QwenImageTransformer2DModel


class TransformerFilesMixin(ModelMixin, FromOriginalModelMixin):
    """Loading and saving of `QwenImageTransformer2DModel`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "QwenImageTransformer2DModel":
        """Load from a folder or the Hub, as diffusers does; also what `save_pretrained` wrote in 8 bits."""
        from .quantize.loader import register_loader

        register_loader()
        return cast("QwenImageTransformer2DModel", super().from_pretrained(*args, **kwargs))

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look for `variant` in the signature
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, layers in 8 bits as they are; `from_pretrained` of this class reads it."""
        from .quantize.stored import record_of

        record = record_of(self)
        if record is not None or "quantization_config" in self.config:
            self.register_to_config(quantization_config=record)
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: Any,
        *,
        config: str | Path | dict[str, Any] | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        weights: str | None = None,
        skip: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "QwenImageTransformer2DModel":
        """Load a transformer from one safetensors file: diffusers or ComfyUI keys, bf16, fp8 or scaled fp8.

        Args:
            pretrained_model_link_or_path_or_dict: path of the file (or of one shard), or a state dict. A Hub
                link, or `quantization_config`, is passed on to diffusers' own loader.
            config: folder or Hub id whose config.json to use, or the config itself. Without it the sizes are
                read off the shapes.
            subfolder: of `config`.
            dtype: type of the loaded weights; bf16 when not given.
            torch_dtype: older name of `dtype`.
            device: where the weights go.
            weights: kind of 8 bits in which to keep the layers (quantize.quantize_). What a file holds so is
                taken as it is stored. Without it, 8-bit weights are multiplied out.
            skip: layers that stay in `dtype`, where the file is not of 8 bits.

        Raises:
            ValueError: if the file is damaged, is no Qwen-Image transformer, or has unknown or missing keys.
        """
        from .checkpoint import load_transformer_file

        model_class = cast("type[QwenImageTransformer2DModel]", cls)
        source = pretrained_model_link_or_path_or_dict
        if kwargs or (isinstance(source, str) and source.startswith(("http://", "https://"))):
            # Options and links that only diffusers' loader knows (GGUF, revisions, tokens).
            loaded = super().from_single_file(
                source,
                config=config,
                subfolder=subfolder,
                dtype=dtype or torch_dtype,
                device=device,
                **kwargs,
            )
            return cast("QwenImageTransformer2DModel", loaded)
        if weights is not None:
            from .quantize import SKIPPED, load_quantized

            if isinstance(config, str | Path):
                config = cast(dict[str, Any], cls.load_config(str(config), subfolder=subfolder))
            return load_quantized(
                model_class,
                source,
                weights,
                config=config,
                skip=SKIPPED if skip is None else skip,
                dtype=dtype or torch_dtype or torch.bfloat16,
                device=device,
            )
        return load_transformer_file(
            model_class,
            source,
            config=config,
            subfolder=subfolder,
            dtype=dtype or torch_dtype or torch.bfloat16,
            device=device,
        )
