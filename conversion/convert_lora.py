"""Write a LoRA file in another format, proved equal before it appears: `qwenimage lora convert` as a script.

    python conversion/convert_lora.py INPUT OUTPUT --to TARGET [--strict] [--allow-approximate]

README.md in this folder lists the formats and the targets.
"""

import sys
from collections.abc import Sequence

from diffusers_qwenimage.cli import main


def convert(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0 done, 2 refused or bad input (one line on stderr)."""
    return main(["lora", "convert", *arguments])


if __name__ == "__main__":
    sys.exit(convert(sys.argv[1:]))
