"""Measure a checkpoint: draw captions whose combinations were held out of training, judge the pictures.

    python evaluate.py                                 # 200 captions, the checkpoint inside the package
    python evaluate.py --model FOLDER --grid out.png --json out.json
    python evaluate.py --lora FILE --new-colour "light blue" 70 175 250   # what a LoRA has learned
    python evaluate.py --captions mine.txt --grid out.png   # only draws: one caption a line

With a new colour, captions show things of it (renamed.py), and half as many show colours known before.

Each picture has a seed of its own (seed + its number), so results do not depend on the batch size.
"""

import argparse
import importlib
import json
import random
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grammar import Caption, Scene, sample_scene, write_caption
from judge import Verdict, judge
from numpy.typing import NDArray
from PIL import Image
from renamed import NewColour, is_coloured
from safetensors.torch import load_file

EMBEDDED = Path(__file__).parents[2] / "diffusers_qwenimage" / "assets" / "tiny"
SHARES = {1: 0.25, 2: 0.45, 3: 0.30}  # of captions by number of groups
SIDE = 256
NEW, KNOWN = "new colour", "known colours"


@dataclass(frozen=True, kw_only=True)
class Request:
    scene: Scene
    caption: Caption
    colours: str = ""  # the category where there is a new colour

    @property
    def category(self) -> str:
        if self.colours:
            return self.colours
        number = len(self.scene.groups)
        if number == 1:
            return "one group"
        return f"{('two', 'three')[number - 2]} groups, {'related' if self.caption.relations else 'listed'}"


def main() -> None:
    args = read_arguments()
    pipe = load(args.model, args.library, args.dtype, args.device)
    load_trained(pipe, lora=args.lora, dit=args.dit)
    started = time.monotonic()
    if args.captions:
        captions = [
            line.strip() for line in args.captions.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        pictures = draw(pipe, captions, steps=args.steps, cfg=args.cfg, seed=args.seed, batch=args.batch)
        save_grid(pictures, args.grid or Path("grid.png"), None)
        return
    colour = new_colour(args.new_colour)
    if colour is None:
        requests = held_out_requests(args.number, args.captions_seed)
    else:
        requests = colour_requests(colour, args.number)
    pictures = draw_requests(pipe, requests, steps=args.steps, cfg=args.cfg, seed=args.seed, batch=args.batch)
    seconds = time.monotonic() - started
    verdicts = judged(pictures, requests, colour)
    report(requests, verdicts)
    print(
        f"{len(requests)} pictures, {args.steps} steps, CFG {args.cfg}, {args.dtype}, {args.library}: "
        f"{seconds:.0f} s"
    )
    if args.grid:
        save_grid(pictures, args.grid, verdicts)
    if args.json:
        args.json.write_text(json.dumps(summarise(requests, verdicts), indent=1) + "\n", encoding="utf-8")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--lora", type=Path, help="a LoRA to load on top")
    parser.add_argument(
        "--dit", type=Path, help="weights of a fine-tuned transformer in place of the model's"
    )
    parser.add_argument(
        "--new-colour", nargs=4, metavar=("NAME", "R", "G", "B"), help="judge a colour in the place of purple"
    )
    parser.add_argument("--library", default="diffusers", help="module that has QwenImagePipeline")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions-seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", type=Path, help="draw these instead, one a line, without judging")
    parser.add_argument("--grid", type=Path, help="PNG of all pictures; wrong ones have a red frame")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load(model: Path, library: str, dtype: str, device: str) -> Any:
    pipeline = importlib.import_module(library).QwenImagePipeline
    pipe = pipeline.from_pretrained(str(model), torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_trained(pipe: Any, *, lora: Path | None, dit: Path | None) -> None:
    """Give a pipeline what was trained."""
    if dit is not None:
        pipe.transformer.load_state_dict(load_file(dit))
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)


def new_colour(given: list[str] | None) -> NewColour | None:
    """The colour of the command line."""
    if given is None:
        return None
    red, green, blue = map(int, given[1:])
    return NewColour(name=given[0], rgb=(red, green, blue))


def colour_requests(colour: NewColour, number: int) -> list[Request]:
    """`number` held-out scenes of a new colour, and half as many of known ones."""
    shown = colour.scenes(number, 1000, held_out=True, share=1.0)
    known = colour.scenes(number // 2, 1000, held_out=True, share=0.0)
    new = [Request(scene=scene, caption=caption, colours=NEW) for scene, caption in shown]
    return new + [Request(scene=scene, caption=caption, colours=KNOWN) for scene, caption in known]


def judged(
    pictures: NDArray[np.uint8], requests: list[Request], colour: NewColour | None = None
) -> list[Verdict]:
    """What the judge, told the new colour, says of each picture."""
    verdicts = []
    for picture, request in zip(pictures, requests, strict=True):
        with nullcontext() if colour is None or request.colours == KNOWN else colour.shown():
            verdicts.append(judge(picture, request.scene, request.caption))
    return verdicts


def held_out_requests(number: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    requests = []
    for i in range(number):
        groups = 1 if i < SHARES[1] * number else 2 if i < (SHARES[1] + SHARES[2]) * number else 3
        scene = sample_scene(rng, num_groups=groups, held_out=True)
        requests.append(Request(scene=scene, caption=write_caption(scene, rng)))
    return requests


def draw(
    pipe: Any, captions: list[str], *, steps: int, cfg: float, seed: int, batch: int
) -> NDArray[np.uint8]:
    """Pictures (N, 256, 256, 3)."""
    pictures = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        seeds = range(seed + start, seed + start + len(part))
        images = pipe(
            part,
            negative_prompt=[" "] * len(part),
            true_cfg_scale=cfg,
            num_inference_steps=steps,
            height=SIDE,
            width=SIDE,
            generator=[torch.Generator("cpu").manual_seed(number) for number in seeds],
        ).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return np.stack(pictures)


def draw_requests(
    pipe: Any, requests: list[Request], *, steps: int, cfg: float, seed: int, batch: int
) -> NDArray[np.uint8]:
    """Their pictures; seeds begin anew with the known colours."""
    pictures = []
    for _, group in groupby(requests, key=lambda request: request.colours):
        captions = [request.caption.text for request in group]
        pictures.append(draw(pipe, captions, steps=steps, cfg=cfg, seed=seed, batch=batch))
    return np.concatenate(pictures)


def summarise(requests: list[Request], verdicts: list[Verdict]) -> dict[str, Any]:
    total: Counter[str] = Counter(request.category for request in requests)
    right = Counter(request.category for request, v in zip(requests, verdicts, strict=True) if v.right)
    faults = Counter(fault for verdict in verdicts for fault in verdict.faults)
    pairs = list(zip(requests, verdicts, strict=True))
    wrong = [
        {"caption": request.caption.text, "faults": verdict.faults, "found": verdict.found}
        for request, verdict in pairs
        if not verdict.right
    ]
    return {
        "right": right.total(),
        "number": total.total(),
        "by category": {name: [right[name], number] for name, number in sorted(total.items())},
        "only the new colour": sum(is_coloured(v) for request, v in pairs if request.colours == NEW),
        "faults": dict(faults.most_common()),
        "wrong": wrong,
    }


def report(requests: list[Request], verdicts: list[Verdict]) -> None:
    summary = summarise(requests, verdicts)
    for name, (right, number) in summary["by category"].items():
        print(f"{name:22} {right:4} of {number:4}  {100 * right / number:5.1f} %")
    if NEW in summary["by category"]:
        print(f"only things of the new colour, on the right background: {summary['only the new colour']}")
    right, number = summary["right"], summary["number"]
    print(f"{'all':22} {right:4} of {number:4}  {100 * right / number:5.1f} %")
    print("faults:", ", ".join(f"{name} {number}" for name, number in summary["faults"].items()) or "none")
    for item in summary["wrong"]:
        print(f"  {item['caption']!r}: {', '.join(item['faults'])}; drawn: {item['found']}")


def save_grid(pictures: NDArray[np.uint8], path: Path, verdicts: list[Verdict] | None) -> None:
    framed = pictures.copy()
    for picture, verdict in zip(framed, verdicts or [], strict=False):
        if not verdict.right:
            picture[:4], picture[-4:], picture[:, :4], picture[:, -4:] = [np.array((255, 0, 0))] * 4
    columns = min(20, len(framed))
    rows = -(-len(framed) // columns)
    sheet = np.full((rows * columns, SIDE, SIDE, 3), 255, dtype=np.uint8)
    sheet[: len(framed)] = framed
    sheet = sheet.reshape(rows, columns, SIDE, SIDE, 3).swapaxes(1, 2).reshape(rows * SIDE, columns * SIDE, 3)
    image = Image.fromarray(sheet)
    image.reduce(2).save(path) if len(framed) > 40 else image.save(path)


if __name__ == "__main__":
    main()
