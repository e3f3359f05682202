"""Teach the small model inside the package a colour that it does not know, and measure it before and after.

    python new_colour.py OUT                      # dataset, judgement, LoRA, judgement
    python new_colour.py OUT --full               # fine-tunes the whole dit instead of a LoRA
    python new_colour.py OUT learning_rate=1e-3   # with other options of training

The colour is light blue, which the small model draws as plain blue. Scenes of examples/tiny show it whose
purple is drawn and called light blue, so that its judge, told the new colour, decides from the pixels. The
pictures that are judged show combinations that were not trained.
"""

import argparse
import csv
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from diffusers_qwenimage import default_checkpoint
from diffusers_qwenimage.training import train
from diffusers_qwenimage.training.options import make_config

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
import evaluate
from renamed import OLD, NewColour, is_coloured
from scenes import batch_scenes, lay_out, render

COLOUR = NewColour(name="light blue", rgb=(70, 175, 250))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 480
ALL_LAYERS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.0.proj,img_mlp.net.2,"
    "img_mod.1,txt_mlp.net.0.proj,txt_mlp.net.2,txt_mod.1"
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Numbers of pictures: with things of the new colour only; right in every respect; right without it.

    The last is over half as many captions of colours that were known before.
    """

    coloured: int
    right: int
    kept: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="fine-tune the whole dit")
    parser.add_argument("--model", type=Path, help="another checkpoint of the same layout")
    parser.add_argument("--scenes", type=int, default=96)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (480)")
    parser.add_argument("--judged", type=int, default=16)
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="of training")
    args = parser.parse_intermixed_args()
    model = args.model or default_checkpoint()
    write_dataset(args.out / "data", args.scenes)
    before = measure(model, args.judged, grid=args.out / "before.png")
    started = time.monotonic()
    options = yaml.safe_load("\n".join(option.replace("=", ": ", 1) for option in args.options)) or {}
    weights = teach(args.out, model, steps=args.steps, full=args.full, **options)
    seconds = time.monotonic() - started
    after = measure(model, args.judged, weights=weights, full=args.full, grid=args.out / "after.png")
    print(f"{args.steps} steps in {seconds:.0f} s; of {args.judged} pictures, before and after:")
    print(f"  only things of the new colour, on the right background: {before.coloured}, {after.coloured}")
    print(f"  right in every respect: {before.right}, {after.right}")
    print(f"  right, of {args.judged // 2} of known colours: {before.kept}, {after.kept}")


def write_dataset(folder: Path, number: int, *, seed: int = 0) -> None:
    """`number` pictures with captions: one in six shows the new colour, the others keep what is known.

    These stand there without a caption too: what guidance leads away from must not drift to the new colour.
    """
    folder.mkdir(parents=True)
    rows = [("image", "prompt")]
    with COLOUR.shown():
        for index, (scene, caption) in enumerate(COLOUR.scenes(number, seed, held_out=False, share=2 / 3)):
            placed = lay_out(scene, random.Random(seed + index))
            pixels = render(batch_scenes([(scene.background, placed)]))[0]
            array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / f"{index}.png")
            rows.append((f"{index}.png", caption.text))
            if scene.groups[0].colour != OLD:
                rows.append((f"{index}.png", " "))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def teach(out: Path, model: Path, *, steps: int, full: bool = False, **changes: Any) -> Path:
    """Train a LoRA, or the whole dit, on `out/data`; returns the weights."""
    kind: dict[str, Any] = (
        {"trainable_models": "dit", "learning_rate": 5e-4}
        if full
        else {"lora_base_model": "dit", "lora_target_modules": ALL_LAYERS, "learning_rate": 4e-3}
    )
    parts = ", ".join(f'"{model / name}"' for name in ("transformer", "text_encoder", "vae"))
    settings = {
        "dataset_base_path": str(out / "data"),
        "model_paths": f"[{parts}]",
        "tokenizer_path": str(model / "tokenizer"),
        "output_path": str(out / "run"),
        "height": 256,
        "width": 256,
        "dtype": "float32",
        "lora_rank": 32,
        "batch_size": 4,
        "max_steps": steps,
        "save_steps": steps,
        "warmup_steps": 10,
        "lr_schedule": "cosine",
        "align_to_opensource_format": not full,
        **kind,
        **changes,
    }
    return train(make_config(settings))


def measure(
    model: Path, number: int, *, weights: Path | None = None, full: bool = False, grid: Path | None = None
) -> Measured:
    """Judge `number` pictures of combinations with the new colour that were not trained."""
    pipe = evaluate.load(model, "diffusers_qwenimage", "float32", DEVICE)
    evaluate.load_trained(pipe, lora=None if full else weights, dit=weights if full else None)
    requests = evaluate.colour_requests(COLOUR, number)
    pictures = evaluate.draw_requests(pipe, requests, steps=12, cfg=4.0, seed=0, batch=8)
    if grid is not None:
        Image.fromarray(np.concatenate(pictures[:8], axis=1)).save(grid)
    verdicts = evaluate.judged(pictures, requests, COLOUR)
    evaluate.report(requests, verdicts)
    return Measured(
        coloured=sum(map(is_coloured, verdicts[:number])),
        right=sum(verdict.right for verdict in verdicts[:number]),
        kept=sum(verdict.right for verdict in verdicts[number:]),
    )


if __name__ == "__main__":
    main()
