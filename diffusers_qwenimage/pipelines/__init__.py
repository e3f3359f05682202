"""diffusers-style pipelines: stock names, arguments and results over the package's one denoising loop."""

from .image_to_image import QwenImageImg2ImgPipeline
from .inpaint import QwenImageInpaintPipeline
from .text_to_image import QwenImagePipeline

__all__ = ["QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImagePipeline"]
