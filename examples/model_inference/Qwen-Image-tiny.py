"""The same with the small model inside the package, on the CPU."""

import torch

from diffusers_qwenimage import default_checkpoint
from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline

folder = default_checkpoint()
pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.float32,
    device="cpu",
    model_configs=[ModelConfig(folder / name) for name in ("transformer", "text_encoder", "vae")],
    tokenizer_config=ModelConfig(folder / "tokenizer"),
)
image = pipe(
    "a big red star on a white background", negative_prompt=" ", cfg_scale=4, height=256, width=256, seed=0
)
image.save("image.png")
