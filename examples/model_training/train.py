"""Train Qwen-Image: `qwenimage train` under the name that DiffSynth-Studio's commands call.

accelerate launch examples/model_training/train.py --help
"""

import sys

from diffusers_qwenimage.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
