"""`python -m diffusers_qwenimage` is the command `qwenimage`."""

import sys

from diffusers_qwenimage.cli import main

if __name__ == "__main__":
    sys.exit(main())
