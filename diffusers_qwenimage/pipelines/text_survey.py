"""A text encoder taken apart for streaming: the layers of its language model, and what prompts do not run."""

from typing import Any

from torch import nn

from diffusers_qwenimage.offload import Surveys, surveys_of

LANGUAGE_LAYERS = ("model.language_model.layers", "language_model.layers", "model.layers", "layers")
NOT_RUN = ("lm_head", "model.visual", "visual")  # by text prompts


def text_encoder_surveys(text_encoder: nn.Module) -> Surveys:
    """A text encoder taken apart: its layers stream, what prompts do not run stays away."""
    names = dict(text_encoder.named_modules())
    tied = getattr(text_encoder, "all_tied_weights_keys", None) or {}
    aside = [name for name in NOT_RUN if name in names and f"{name}.weight" not in tied]
    return surveys_of(text_encoder, blocks=[_layers_name(text_encoder)], on_call=aside)


def language_layers(text_encoder: Any) -> nn.ModuleList:
    """The layers of the language model in a text encoder."""
    layers = text_encoder.get_submodule(_layers_name(text_encoder))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _layers_name(text_encoder: Any) -> str:
    names = dict(text_encoder.named_modules())
    for name in LANGUAGE_LAYERS:
        if name in names:
            return name
    raise ValueError(
        f"{type(text_encoder).__name__} has none of the lists of layers {', '.join(LANGUAGE_LAYERS)}; it is "
        "not a Qwen2.5-VL."
    )
