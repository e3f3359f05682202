"""A LoRA of any tool -> what DiffSynth-Studio's trainer writes and its loader reads.

    python conversion/opensource_to_diffsynth.py INPUT OUTPUT [--allow-approximate]

DiffSynth-Studio has no place for an alpha: where alpha and rank differ, the scale is multiplied into a factor
if that is exact. Otherwise the conversion is refused, and `--allow-approximate` rounds the factor to fp32. A
file that `diffsynth_to_opensource.py` wrote comes back byte by byte.
"""

import sys

from convert_lora import convert

if __name__ == "__main__":
    sys.exit(convert([*sys.argv[1:], "--to", "diffsynth"]))
