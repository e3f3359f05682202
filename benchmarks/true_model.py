"""A model of the true size on disk, of random weights: written in seconds, since all blocks share theirs.

The VAE is whole and random, the tokenizer that of the embedded checkpoint.
"""

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from results import RESULTS
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_qwenimage import AutoencoderKLQwenImage, QwenImageTransformer2DModel, default_checkpoint
from diffusers_qwenimage.checkpoint import empty_module
from diffusers_qwenimage.files import write_text
from diffusers_qwenimage.loading import load_scheduler

FOLDER = Path("/dev/shm/qwen-image-random")
SHARD_BYTES = 2 * 10**9
WRITERS = 16
RANDOM_VALUES = 2**24 + 3  # odd, so that rows of a matrix differ
TEXT_CONFIG = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1_000_000.0,
}
VISION_CONFIG = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "depth": 32,
    "num_heads": 16,
}
PROMPT = "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the model is, how large it is, and what is drawn with it on what."""
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the model")
    parser.add_argument("--keep", action="store_true", help="leave the model there")
    parser.add_argument("--blocks", type=int, default=60, help="of the transformer (60)")
    parser.add_argument("--layers", type=int, default=28, help="of the text encoder (28)")
    parser.add_argument("--steps", type=int, default=20, help="of the schedule (20)")
    parser.add_argument("--device", default="cuda", help="(cuda)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="table to append to")


def write_model(folder: Path, blocks: int, layers: int) -> None:
    """A model in diffusers' layout, of random weights N(0, 0.02), norms 1; all blocks are alike."""
    transformer = empty_module(lambda: QwenImageTransformer2DModel(num_layers=blocks))
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "num_hidden_layers": layers}, vision_config=VISION_CONFIG
    )
    text_encoder = empty_module(lambda: Qwen2_5_VLForConditionalGeneration(config))
    vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    largest = max(math.prod(p.shape) for part in (transformer, text_encoder) for p in part.parameters())
    values = random_bytes(largest)
    for part in ("transformer", "text_encoder"):
        (folder / part).mkdir(parents=True)
    transformer.save_config(folder / "transformer")
    config.save_pretrained(folder / "text_encoder")
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [
            *write_shards(
                pool, folder / "transformer", "diffusion_pytorch_model", shapes(transformer), values
            ),
            *write_shards(pool, folder / "text_encoder", "model", shapes(text_encoder), values),
        ]
        wait(jobs)
    vae.save_pretrained(folder / "vae")
    load_scheduler().save_pretrained(folder / "scheduler")
    for part in ("tokenizer", "model_index.json"):
        source = default_checkpoint() / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / part)


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a state dict."""
    return {key: tuple(value.shape) for key, value in module.state_dict(keep_vars=True).items()}


def write_shards(
    pool: ThreadPoolExecutor,
    folder: Path,
    stem: str,
    sizes: Mapping[str, tuple[int, ...]],
    values: memoryview,
) -> list[Future[None]]:
    """Write tensors of these shapes, bf16, straight from memory that all of them share."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in sizes.items():
        num_bytes = 2 * math.prod(shape)
        if size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    ones = ones_bytes()

    def write(name: str, keys: Sequence[str]) -> None:
        with (folder / name).open("wb", buffering=0) as file:
            file.write(header(keys, sizes))
            for key in keys:
                source = ones if is_norm(key, sizes[key]) else values
                view = source[: 2 * math.prod(sizes[key])]
                while view:
                    view = view[file.write(view) :]

    index = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    content = json.dumps({"metadata": {}, "weight_map": index})
    write_text(folder / f"{stem}.safetensors.index.json", content)
    return [pool.submit(write, name, keys) for name, keys in zip(names, shards, strict=True)]


def header(keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file with these tensors in order."""
    entries, end = {}, 0
    for key in keys:
        start, end = end, end + 2 * math.prod(shapes[key])
        entries[key] = {"dtype": "BF16", "shape": list(shapes[key]), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def wait(jobs: Iterable[Any]) -> None:
    """Until all are done; raises what one of them raised."""
    for job in list(jobs):
        job.result()


def random_bytes(num_elements: int) -> memoryview:
    """N(0, 0.02) in bf16: so many values, repeating themselves."""
    drawn = torch.randn(RANDOM_VALUES, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    repeated = drawn.repeat(-(-num_elements // RANDOM_VALUES))[:num_elements]
    return memoryview(repeated.view(torch.uint8).numpy()).cast("B")


def ones_bytes() -> memoryview:
    """Ones in bf16, for norms."""
    return memoryview(torch.ones(1 << 16, dtype=torch.bfloat16).view(torch.uint8).numpy()).cast("B")


def is_norm(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor scales what is normalised."""
    return len(shape) == 1 and key.endswith("weight")
