"""What weights in 8 bits cost in quality, on the embedded checkpoint.

    python benchmarks/quality.py [--number 200] [--arms NAME ...] [--results FILE]

Draws the same held-out captions from the same noise with every kind of weights, 20 steps, guidance 4.
Reported: how many pictures are right (examples/tiny/evaluate.py) and PSNR to the float32 pictures, mean over
the pictures. The small model has no outlier channels; `quantization.py` has the errors with them.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from judging import Judges, arguments, psnr, with_float32_noise
from results import record
from step_reduction import CFG

from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.graphs import graphs_of
from diffusers_qwenimage.quantize import quantize_

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny"))
from evaluate import draw, held_out_requests  # noqa: E402

ARMS = ("float32", "bf16", "fp8", "int8", "fp8-storage")


def main() -> None:
    """Draw with every kind and record it."""
    parser = arguments(__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="kinds beside float32 (all)")
    args = parser.parse_args()
    requests = held_out_requests(args.number, seed=1)
    captions = [request.caption.text for request in requests]
    judges = Judges(requests)
    exact = None
    for arm in dict.fromkeys((ARMS[0], *args.arms)):
        pipe = load(args.model, arm, args.device)
        pictures = draw(with_float32_noise(pipe), captions, steps=20, cfg=CFG, seed=0, batch=args.batch)
        exact = pictures if exact is None else exact
        case = f"{len(requests)} captions, {arm}"
        record("quality", f"{case}: right", judges.percent_right(pictures), "%", path=args.results)
        if pictures is not exact:
            record("quality", f"{case}: PSNR to float32", psnr(pictures, exact), "dB", path=args.results)
    judges.stop()


def load(model: Path, arm: str, device: str) -> Any:
    """The pipeline with weights of that kind; what is in 8 bits computes the rest in bf16."""
    dtype = torch.float32 if arm == "float32" else torch.bfloat16
    pipe = QwenImagePipeline.from_pretrained(str(model), dtype=dtype).to(device)
    if arm not in ("float32", "bf16"):
        quantize_(pipe.transformer, arm)
    pipe.set_progress_bar_config(disable=True)
    graphs_of(pipe.transformer).mode = "on"  # the same bits, with a hundredth of the launches
    return pipe


if __name__ == "__main__":
    main()
