"""`from_pretrained` of diffusers for models with our quantised layers (its quantiser interface)."""

from enum import Enum
from typing import Any, cast

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from .layers import QuantizedLinear
from .stored import METHOD, quantize_layers_


class Method(str, Enum):
    """The name of the method as diffusers wants it."""

    OURS = METHOD


class QuantizedLayersConfig(QuantizationConfigMixin):
    """Which layers are quantised: kind -> names, see stored.py."""

    def __init__(self, layers: dict[str, list[str]], quant_method: str = METHOD) -> None:
        self.quant_method = Method(quant_method)
        self.layers = layers

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"quant_method": self.quant_method.value, "layers": self.layers}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults."""
        return self.to_dict()


class QuantizedLayersLoader(DiffusersQuantizer):
    """Puts quantised layers into an empty model, and their tensors into them."""

    quantization_config: QuantizedLayersConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed but torch; a model that is not quantised is refused.

        Raises:
            ValueError: if the files do not say that they are quantised.
        """
        if not self.pre_quantized:
            raise ValueError(
                f"{METHOD} loads what was quantised before. Otherwise call quantize_ on the loaded model."
            )

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether this is the weight or the scale of a quantised layer."""
        owner, _, name = param_name.rpartition(".")
        return name in ("weight", "weight_scale") and isinstance(model.get_submodule(owner), QuantizedLinear)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give the layer its tensor as it is stored: `param_value` may have been cast."""
        owner, _, name = param_name.rpartition(".")
        layer = cast(QuantizedLinear, model.get_submodule(owner))
        value = state_dict[param_name].to(target_device)
        if name == "weight":
            layer.weight = nn.Parameter(value, requires_grad=False)
        else:
            layer.weight_scale = value
        layer.compute_dtype = kwargs.get("dtype") or layer.compute_dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        quantize_layers_(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    @property
    def is_serializable(self) -> bool:
        """Saving writes the tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on the layers can be trained."""
        return True


def register_loader() -> None:
    """Make diffusers know the method; twice does no harm."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = QuantizedLayersLoader
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantizedLayersConfig
