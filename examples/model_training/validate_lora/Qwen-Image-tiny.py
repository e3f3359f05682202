"""Draw with the LoRA that lora/Qwen-Image-tiny.sh trained, or with the file that is named."""

import sys

import torch

from diffusers_qwenimage import QwenImagePipeline, default_checkpoint

weights = sys.argv[1] if len(sys.argv) > 1 else "models/train/tiny_lora/step-300.safetensors"
pipe = QwenImagePipeline.from_pretrained(default_checkpoint(), torch_dtype=torch.float32)
pipe.load_lora_weights(weights)
image = pipe(
    "emoji of a grinning face",
    negative_prompt=" ",
    height=256,
    width=256,
    num_inference_steps=20,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
