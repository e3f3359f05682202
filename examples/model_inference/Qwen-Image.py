import torch

from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline

MODEL = "Qwen/Qwen-Image"

pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id=MODEL, origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors"),
        ModelConfig(model_id=MODEL, origin_file_pattern="text_encoder/model*.safetensors"),
        ModelConfig(model_id=MODEL, origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id=MODEL, origin_file_pattern="tokenizer/"),
)
prompt = "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating."
image = pipe(prompt, seed=0, num_inference_steps=40)
image.save("image.jpg")
