#!/usr/bin/env bash
# A LoRA of rank 32 on the README's twelve kinds of layers. The frozen weights in bf16 take 27 GB, since the modulation
# is a table in host memory; --base_weights fp8 halves them, --vram_limit 12 streams what does not fit into 12 GiB. On a
# card of 80 GB --gradient_checkpointing none is quicker.
set -euo pipefail
accelerate launch examples/model_training/train.py \
  --dataset_base_path examples/datasets/emoji \
  --dataset_metadata_path examples/datasets/emoji/metadata.csv \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" \
  --learning_rate 1e-4 \
  --num_epochs 5 \
  --remove_prefix_in_ckpt "pipe.dit." \
  --output_path "./models/train/Qwen-Image_lora" \
  --lora_base_model "dit" \
  --lora_target_modules "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1" \
  --lora_rank 32 \
  --align_to_opensource_format \
  --gradient_checkpointing full "$@"
