"""Qwen-Image on a card with little memory: weights in fp8 that stream from host memory.

As in DiffSynth-Studio; the transformer and the text encoder wait in fp8, scaled per output channel. Without
`offload_dtype` pictures are bit for bit those of a card with enough memory, and twice as much streams.
"""

import torch

from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline

MODEL = "Qwen/Qwen-Image"
LOW_VRAM = {"offload_device": "cpu", "offload_dtype": torch.float8_e4m3fn}

pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(
            model_id=MODEL,
            origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors",
            **LOW_VRAM,
        ),
        ModelConfig(model_id=MODEL, origin_file_pattern="text_encoder/model*.safetensors", **LOW_VRAM),
        ModelConfig(
            model_id=MODEL, origin_file_pattern="vae/diffusion_pytorch_model.safetensors", **LOW_VRAM
        ),
    ],
    tokenizer_config=ModelConfig(model_id=MODEL, origin_file_pattern="tokenizer/"),
)
pipe.enable_vram_management()  # all that is free on the card; vram_limit=8 for a budget in GiB
print(pipe.memory_report())
prompt = "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating."
image = pipe(prompt, seed=0, num_inference_steps=40)
image.save("image.jpg")
