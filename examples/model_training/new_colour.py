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
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from diffusers_qwenimage import QwenImagePipeline, default_checkpoint
from diffusers_qwenimage.loading import load_transformer
from diffusers_qwenimage.training import train
from diffusers_qwenimage.training.options import make_config

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
from grammar import Caption, Scene, sample_scene, write_caption
from judge import Verdict, judge
from scenes import PALETTE, batch_scenes, lay_out, render

OLD, NEW, COLOUR = "purple", "light blue", (70, 175, 250)
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
    with new_colour():
        for index, (scene, caption) in enumerate(scenes(number, seed, held_out=False, share=2 / 3)):
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
    pipe = QwenImagePipeline.from_pretrained(str(model), dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    if weights is not None and full:
        pipe.transformer = load_transformer(weights, dtype=torch.float32).to(DEVICE)
    elif weights is not None:
        pipe.load_lora_weights(str(weights))
    pairs = scenes(number, 1000, held_out=True, share=1.0)
    pictures = draw(pipe, [caption.text for _, caption in pairs])
    if grid is not None:
        Image.fromarray(np.concatenate(pictures[:8], axis=1)).save(grid)
    with new_colour():
        verdicts = judged(pictures, pairs)
    known = scenes(number // 2, 1000, held_out=True, share=0.0)
    kept = judged(draw(pipe, [caption.text for _, caption in known]), known)
    return Measured(
        coloured=sum(map(is_coloured, verdicts)),
        right=sum(verdict.right for verdict in verdicts),
        kept=sum(verdict.right for verdict in kept),
    )


def judged(pictures: Sequence[np.ndarray], pairs: Sequence[tuple[Scene, Caption]]) -> list[Verdict]:
    """What the judge finds, which is printed too."""
    verdicts = [judge(picture, *pair) for picture, pair in zip(pictures, pairs, strict=True)]
    for verdict, (_, caption) in zip(verdicts, pairs, strict=True):
        print(f"  {caption.text!r}: {'right' if verdict.right else verdict.faults} ({verdict.found})")
    return verdicts


def is_coloured(verdict: Verdict) -> bool:
    """Whether the judge saw things of the new colour, and of no other, on the right background."""
    things = verdict.found.rpartition(" on ")[0]
    return "background" not in verdict.faults and all(f" {OLD} " in thing for thing in things.split(", "))


@torch.no_grad()
def draw(pipe: Any, captions: Sequence[str]) -> list[np.ndarray]:
    """A picture (256, 256, 3) for each caption."""
    pictures = []
    for start in range(0, len(captions), 8):
        part = list(captions[start : start + 8])
        images = pipe(
            part,
            negative_prompt=[" "] * len(part),
            num_inference_steps=12,
            height=256,
            width=256,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        ).images
        pictures += [np.asarray(image) for image in images]
    return pictures


def scenes(number: int, seed: int, *, held_out: bool, share: float) -> list[tuple[Scene, Caption]]:
    """Scenes of one group, and their captions.

    `share` is the chance that a scene in the new colour is taken, and that one in another colour is not; one
    in nine that are drawn is in the new colour.
    """
    draw = random.Random(seed)
    found = []
    while len(found) < number:
        scene = sample_scene(draw, num_groups=1, held_out=held_out)
        wanted = draw.random() < share
        if scene.background == OLD or (scene.groups[0].colour == OLD) != wanted:
            continue
        caption = write_caption(scene, draw)
        text = re.sub(r"\b(purple|violet)\b", _renamed, caption.text, flags=re.IGNORECASE)
        found.append((scene, Caption(text=text, relations=caption.relations)))
    return found


@contextmanager
def new_colour() -> Iterator[None]:
    """Within, what the grammar calls purple is drawn, and judged, in the new colour."""
    before = PALETTE[OLD]
    PALETTE[OLD] = COLOUR
    try:
        yield
    finally:
        PALETTE[OLD] = before


def _renamed(match: re.Match[str]) -> str:
    word = match[0]
    return NEW.upper() if word.isupper() else NEW.capitalize() if word[0].isupper() else NEW


if __name__ == "__main__":
    main()
