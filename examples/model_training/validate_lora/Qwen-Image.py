import torch

from diffusers_qwenimage import QwenImagePipeline

pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("models/train/Qwen-Image_lora/epoch-4.safetensors")
# Guidance acts where there is a negative prompt.
image = pipe("emoji of a grinning face", negative_prompt=" ", seed=0).images[0]
image.save("image.jpg")
