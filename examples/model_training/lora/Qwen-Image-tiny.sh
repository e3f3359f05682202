#!/usr/bin/env bash
# The small model inside the package, on the CPU; options are in the config, further ones win.
set -euo pipefail
accelerate launch --cpu examples/model_training/train.py \
  --config examples/model_training/configs/tiny_lora.yaml "$@"
