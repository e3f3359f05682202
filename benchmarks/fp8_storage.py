"""Pictures with weights stored in fp8, as `ModelConfig(offload_dtype=torch.float8_e4m3fn)` loads them.

    python benchmarks/fp8_storage.py [--number 100] [--results FILE]

DiffSynth-Studio's README warns of blur and tearing with fp8. There every weight is cast as it is; here each
output channel of the large layers has a scale. The embedded checkpoint draws the same held-out captions from
the same noise with its weights in bf16, in scaled fp8, and cast to fp8 and back. Reported: how many pictures
are right (examples/tiny/evaluate.py), and PSNR to those of float32, mean over the pictures. With `--compute
float32` what is measured is the storage alone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, record
from step_reduction import CFG, psnr

from diffusers_qwenimage import QwenImagePipeline
from diffusers_qwenimage.diffsynth import ModelConfig
from diffusers_qwenimage.diffsynth.models import load_models
from diffusers_qwenimage.loading import load_scheduler, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny"))
from evaluate import EMBEDDED, draw, held_out_requests, summarise  # noqa: E402
from judge import judge  # noqa: E402

FP8 = torch.float8_e4m3fn
ARMS = ("float32", "bfloat16", "fp8, scaled", "fp8, cast")
STEPS = 20


def main() -> None:
    """Draw with every kind of storage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=100, help="captions (100)")
    parser.add_argument("--batch", type=int, default=25, help="pictures at a time (25)")
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")
    args = parser.parse_args()
    requests = held_out_requests(args.number, seed=1)
    captions = [request.caption.text for request in requests]
    exact = None
    compute: torch.dtype = getattr(torch, args.compute)
    for arm in ARMS if compute == torch.bfloat16 else (ARMS[0], *ARMS[2:]):
        pipe = load(arm, compute, args.device)
        pictures = draw(pipe, captions, steps=STEPS, cfg=CFG, seed=0, batch=args.batch)
        exact = pictures if exact is None else exact
        verdicts = [judge(picture, r.scene, r.caption) for picture, r in zip(pictures, requests, strict=True)]
        right = 100 * summarise(requests, verdicts)["right"] / len(requests)
        case = f"{len(requests)} captions, {args.compute}, transformer and text encoder in {arm}"
        if exact is pictures:
            case = f"{len(requests)} captions, float32"
        record("fp8_storage", f"{case}: right", right, "%", path=args.results)
        if pictures is not exact:
            record("fp8_storage", f"{case}: PSNR to float32", psnr(pictures, exact), "dB", path=args.results)


def load(arm: str, compute: torch.dtype, device: str) -> Any:
    """The pipeline with weights stored so; all but the first computes as asked."""
    dtype = torch.float32 if arm == "float32" else compute
    stored = FP8 if arm == "fp8, scaled" else None
    configs = [
        ModelConfig(EMBEDDED / name, offload_dtype=stored) for name in ("transformer", "text_encoder", "vae")
    ]
    models = load_models(configs, dtype=dtype, device=torch.device(device))
    if arm == "fp8, cast":
        for name in ("transformer", "text_encoder"):
            cast_(models[name])  # type: ignore[index]
    pipe = QwenImagePipeline(
        **models,
        tokenizer=load_tokenizer(EMBEDDED / "tokenizer"),
        scheduler=load_scheduler(EMBEDDED / "scheduler"),
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def cast_(module: torch.nn.Module) -> None:
    """Round all weights to fp8 without a scale, as storing them in it does."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(FP8).to(parameter.dtype))


if __name__ == "__main__":
    main()
