"""The only file that touches diffusers' registries; nothing happens before `register()` is called."""

import diffusers

from . import pipelines
from .transformer import QwenImageTransformer2DModel
from .vae import AutoencoderKLQwenImage


def register() -> None:
    """Make diffusers' own loaders return this package's classes for Qwen-Image checkpoints.

    Afterwards `DiffusionPipeline.from_pretrained`, `AutoPipelineForText2Image`, `AutoPipelineForImage2Image`,
    `AutoPipelineForInpainting`, `AutoModel` and `from diffusers import QwenImagePipeline` give our classes.
    Objects and classes that were imported before keep what they are. Calling it twice does no harm.
    """
    from diffusers.pipelines import auto_pipeline  # imports every pipeline of diffusers: most of a second

    classes = [QwenImageTransformer2DModel, AutoencoderKLQwenImage]
    classes += [getattr(pipelines, name) for name in pipelines.__all__]
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["qwenimage"] = pipelines.QwenImagePipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["qwenimage"] = pipelines.QwenImageImg2ImgPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["qwenimage"] = pipelines.QwenImageInpaintPipeline
