"""The same with the small model inside the package, on the CPU: within the smallest budget that works."""

import torch

from diffusers_qwenimage import default_checkpoint
from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline

folder = default_checkpoint()
pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cpu",
    model_configs=[
        ModelConfig(folder / name, offload_device="cpu", offload_dtype=torch.float8_e4m3fn)
        for name in ("transformer", "text_encoder", "vae")
    ],
    tokenizer_config=ModelConfig(folder / "tokenizer"),
)
pipe.enable_vram_management(vram_limit=0)
print(pipe.memory_report())
image = pipe(
    "a big red star on a white background", negative_prompt=" ", cfg_scale=4, seed=0, num_inference_steps=12
)
image.save("image.png")
