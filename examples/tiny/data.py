"""The training set: random scenes, several captions of each, and what each scene holds, as tensors.

Made by processes that each fill chunks from a seed of their own, so the set depends on the seed alone.

    python data.py FILE                  # make it beforehand, for `train.py --data FILE`
"""

import argparse
import os
import random
import re
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from grammar import (
    ARRANGEMENTS,
    COLOURS,
    MAX_SHAPES,
    NEGATIVES,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
    write_caption,
)
from numpy.typing import NDArray
from scenes import SceneBatch, lay_out
from tokenizer import PREFIX_TOKENS, SUFFIX_TOKENS, TEMPLATE, build_tokenizer
from torch import Tensor
from transformers import Qwen2Tokenizer

CHUNK = 4000  # scenes made by one task
CAPTIONS = 4  # of each scene
TEXT_LENGTH = 48  # tokens after the template's prefix, the five of its end included
ALL_ARRANGEMENTS = [arrangement for number in (1, 2, 3) for arrangement in ARRANGEMENTS[number]]
# Classes of what the auxiliary loss reads off the text: background, arrangement, then count, size, colour and
# shape of each group (count 0: no such group).
FACT_CLASSES = [len(COLOURS), len(ALL_ARRANGEMENTS)] + [5, len(SIZES), len(COLOURS), len(SHAPES)] * 3
IGNORED = -100

CHUNK_PARTS = ("geometry", "kinds", "background", "tokens", "facts")
Chunk = tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.int8], NDArray[np.int16], NDArray[np.int8]]


@dataclass(kw_only=True)
class TrainingSet:
    """`tokens` (N, captions, 48) follow the prefix, padded; `facts` (N, 14); `nothing` (M, 48) are empty and
    negative prompts; `prefix` (34,)."""

    scenes: SceneBatch
    tokens: Tensor
    facts: Tensor
    nothing: Tensor
    prefix: Tensor
    padding: int


class Maker:
    """Starts making the set at once, in the background."""

    def __init__(self, number: int, seed: int, workers: int | None = None) -> None:
        self.pool = ProcessPoolExecutor(max_workers=workers or max(1, (os.cpu_count() or 1) - 2))
        seeds = [seed * 1_000_003 + i for i in range(-(-number // CHUNK))]
        self.tasks: list[Future[Chunk]] = [self.pool.submit(make_chunk, chunk_seed) for chunk_seed in seeds]

    def scenes_so_far(self, number: int) -> SceneBatch:
        """The first `number` chunks' scenes."""
        chunks = [task.result() for task in self.tasks[:number]]
        return join_scenes(chunks)

    def finish(self) -> TrainingSet:
        chunks = [task.result() for task in self.tasks]
        self.pool.shutdown()
        return join_chunks(chunks)


class Made:
    """The set that was made beforehand; used like `Maker`."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.chunk: Chunk = tuple(file[name] for name in CHUNK_PARTS)
        self.tasks = [self.chunk]

    def scenes_so_far(self, number: int) -> SceneBatch:
        """The first 32,000 scenes, for `Maker` gives no more of them before it has finished."""
        return join_scenes([self.chunk])[slice(0, 8 * CHUNK)]

    def finish(self) -> TrainingSet:
        return join_chunks([self.chunk])


def join_chunks(chunks: list[Chunk]) -> TrainingSet:
    tokenizer = build_tokenizer()
    return TrainingSet(
        scenes=join_scenes(chunks),
        tokens=torch.from_numpy(np.concatenate([chunk[3] for chunk in chunks])),
        facts=torch.from_numpy(np.concatenate([chunk[4] for chunk in chunks])),
        nothing=torch.from_numpy(tokenize(tokenizer, list(NEGATIVES))),
        prefix=torch.tensor(tokenizer(TEMPLATE.split("{}")[0]).input_ids),
        padding=tokenizer.pad_token_id,
    )


def join_scenes(chunks: list[Chunk]) -> SceneBatch:
    kinds = torch.from_numpy(np.concatenate([chunk[1] for chunk in chunks]))
    return SceneBatch(
        geometry=torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks])).float(),
        shape=kinds[:, 0],
        colour=kinds[:, 1],
        background=torch.from_numpy(np.concatenate([chunk[2] for chunk in chunks])),
    )


def make_chunk(seed: int) -> Chunk:
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    geometry = np.zeros((CHUNK, MAX_SHAPES, 3), dtype=np.float32)
    kinds = np.full((CHUNK, 2, MAX_SHAPES), -1, dtype=np.int8)
    background = np.zeros(CHUNK, dtype=np.int8)
    facts = np.full((CHUNK, len(FACT_CLASSES)), IGNORED, dtype=np.int8)
    texts = []
    for row in range(CHUNK):
        scene = sample_scene(rng)
        for column, item in enumerate(lay_out(scene, rng)):
            geometry[row, column] = item.x, item.y, item.radius
            kinds[row, :, column] = SHAPES.index(item.shape), COLOURS.index(item.colour)
        background[row] = COLOURS.index(scene.background)
        facts[row] = list_facts(scene)
        texts += [short_caption(scene, rng) for _ in range(CAPTIONS)]
    tokens = tokenize(tokenizer, texts).reshape(CHUNK, CAPTIONS, TEXT_LENGTH)
    return geometry, kinds, background, tokens, facts


def short_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that surely fits: words and marks are one token each, a digit after a space two."""
    while True:
        text = write_caption(scene, rng).text
        if len(re.findall(r"[A-Za-z]+|[^\w\s]|(?=\d)|\d", text)) <= TEXT_LENGTH - SUFFIX_TOKENS:
            return text


def list_facts(scene: Scene) -> list[int]:
    facts = [COLOURS.index(scene.background), ALL_ARRANGEMENTS.index(scene.arrangement)]
    for group in scene.groups:
        facts += [
            group.count,
            SIZES.index(group.size),
            COLOURS.index(group.colour),
            SHAPES.index(group.shape),
        ]
    for _ in range(3 - len(scene.groups)):
        facts += [0, IGNORED, IGNORED, IGNORED]
    return facts


def tokenize(tokenizer: Qwen2Tokenizer, texts: list[str]) -> NDArray[np.int16]:
    """Tokens (N, 48) of the filled template after its prefix; a longer text loses its end."""
    result = np.full((len(texts), TEXT_LENGTH), tokenizer.pad_token_id, dtype=np.int16)
    for row, ids in enumerate(tokenizer([TEMPLATE.format(text) for text in texts]).input_ids):
        tail = ids[PREFIX_TOKENS:]
        if len(tail) > TEXT_LENGTH:
            tail = tail[: TEXT_LENGTH - SUFFIX_TOKENS] + tail[-SUFFIX_TOKENS:]
        result[row, : len(tail)] = tail
    return result


def save_set(path: Path, number: int, seed: int) -> None:
    """Makes the set and writes it for `Made`; positions lose at most an eighth of a pixel."""
    maker = Maker(number, seed, workers=os.cpu_count())
    chunks = [task.result() for task in maker.tasks]
    maker.pool.shutdown()
    joined = [np.concatenate([chunk[part] for chunk in chunks]) for part in range(len(CHUNK_PARTS))]
    joined[0] = joined[0].astype(np.float16)
    np.savez_compressed(path, **dict(zip(CHUNK_PARTS, joined, strict=True)))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=Path, help="NumPy file (.npz) to write")
    parser.add_argument("--scenes", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save_set(args.file, args.scenes, args.seed)
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
