"""A LoRA that DiffSynth-Studio trained -> the spelling that diffusers, ComfyUI and the others read as well.

    python conversion/diffsynth_to_opensource.py INPUT OUTPUT

`transformer_blocks.0.attn.to_q.lora_A.default.weight` becomes `….lora_down.weight` with an alpha that equals
the rank; a prefix `pipe.dit.` is taken off. No number changes. `opensource_to_diffsynth.py` gives the input
back, byte by byte. DiffSynth-Studio's own early `--align_to_opensource_format` left out the alpha and wrote
files that diffusers ignores; `convert_lora.py --to diffsynth-bare` writes that form.
"""

import sys

from convert_lora import convert

if __name__ == "__main__":
    sys.exit(convert([*sys.argv[1:], "--to", "opensource"]))
