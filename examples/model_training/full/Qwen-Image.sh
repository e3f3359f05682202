#!/usr/bin/env bash
# The whole dit on one GPU of 80 GB: weights in bf16 are 41 GB, Adafactor's states are small, and every weight takes
# its step as soon as its gradient is known. For several GPUs see configs/fsdp2.yaml.
set -euo pipefail
accelerate launch examples/model_training/train.py \
  --dataset_base_path examples/datasets/emoji \
  --dataset_metadata_path examples/datasets/emoji/metadata.csv \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 1e-5 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/Qwen-Image_full" \
  --trainable_models "dit" \
  --trainable_dtype bfloat16 \
  --optimizer adafactor \
  --optimizer_in_backward \
  --max_grad_norm 0 \
  --gradient_checkpointing full "$@"
