"""Draw with the weights that full/Qwen-Image-tiny.sh trained, or with the file that is named."""

import sys

import torch

from diffusers_qwenimage import default_checkpoint
from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline

weights = sys.argv[1] if len(sys.argv) > 1 else "models/train/tiny_full/step-300.safetensors"
folder = default_checkpoint()
pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.float32,
    device="cpu",
    model_configs=[ModelConfig(weights), ModelConfig(folder / "text_encoder"), ModelConfig(folder / "vae")],
    tokenizer_config=ModelConfig(folder / "tokenizer"),
)
image = pipe("emoji of a grinning face", negative_prompt=" ", cfg_scale=4, height=256, width=256, seed=0)
image.save("image.png")
