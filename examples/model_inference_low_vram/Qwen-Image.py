"""Part by part on the GPU: text encoder, transformer and VAE wait in CPU memory while another one works."""

import torch

from diffusers_qwenimage import QwenImagePipeline

pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()  # the transformer in bf16 needs 41 GB; enable_group_offload() goes lower
pipe.vae.enable_tiling()
prompt = "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating."
image = pipe(prompt, num_inference_steps=40, generator=torch.Generator().manual_seed(0)).images[0]
image.save("image.jpg")
