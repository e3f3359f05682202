"""Run, shrink, convert and train Qwen-Image, with the API of diffusers and that of DiffSynth-Studio.

    from diffusers_qwenimage import QwenImagePipeline

The DiffSynth-style API is `diffusers_qwenimage.diffsynth`. Names are imported when they are first used.
"""

from importlib import import_module
from typing import Any

from .version import __version__

__all__ = [
    "AutoencoderKLQwenImage",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    "__version__",
    "default_checkpoint",
    "register",
]

_MODULES = {
    "AutoencoderKLQwenImage": "diffusers_qwenimage.vae",
    "QwenImageImg2ImgPipeline": "diffusers_qwenimage.pipelines",
    "QwenImageInpaintPipeline": "diffusers_qwenimage.pipelines",
    "QwenImagePipeline": "diffusers_qwenimage.pipelines",
    "QwenImageTransformer2DModel": "diffusers_qwenimage.transformer",
    "default_checkpoint": "diffusers_qwenimage.loading",
    "register": "diffusers_qwenimage.registry",
    # diffusers looks these base classes up here when it loads a component of ours.
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
