"""The API of DiffSynth-Studio's Qwen-Image over this package's engine: change one import line.

    from diffusers_qwenimage.diffsynth import QwenImagePipeline, ModelConfig

Arguments mean what DiffSynth-Studio's README for Qwen-Image says (one prompt in, one Pillow image out;
`seed`, `rand_device`, `cfg_scale`; `denoising_strength` compresses the schedule). The arithmetic is that of
diffusers: tanh-GELU, guidance rescaled to the conditional prediction, pixels rounded and not cut off; so
pictures differ a little from those of DiffSynth-Studio itself.
"""

from .model_config import ModelConfig
from .pipeline import QwenImagePipeline

__all__ = ["ModelConfig", "QwenImagePipeline"]
