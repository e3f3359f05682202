"""Train the small checkpoint from nothing: first the VAE, then text encoder and transformer together.

    python train.py OUT --minutes 9              # on one H100
    python train.py OUT --start OLD --minutes 5  # go on from a checkpoint, with its VAE

The learning rates follow the clock: the VAE stops after its minutes, the transformer when all minutes are used.
Seeds are fixed; the number of steps depends on the machine.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import CHUNK, FACT_CLASSES, IGNORED, Maker, TrainingSet
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from models import (
    GRID,
    LATENT_CHANNELS,
    LATENT_NOISE,
    TEXT_WIDTH,
    FlatVae,
    RealRope,
    encode_text,
    joint_rope,
    make_text_encoder,
    make_transformer,
    pack,
    predict_velocity,
    save_frame,
    save_models,
)
from scenes import SceneBatch, palette_tensor, render
from tokenizer import build_tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

STARTED = time.monotonic()
CROP = 128
AVERAGING = 0.0008  # weight of the newest weights in the average
SHIFT = math.exp(0.5)  # of the sigmas, as the scheduler shifts them for 256 image tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    out: Path
    start: Path | None
    minutes: float
    minutes_vae: float
    scenes: int
    batch: int
    batch_vae: int
    rate: float
    rate_vae: float
    seed: int
    compile: bool
    graph: bool
    vae: Path | None
    device: torch.device = field(
        default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )


def main() -> None:
    settings = read_settings()
    maker = Maker(settings.scenes, settings.seed)
    maker.scenes_so_far(1)  # the processes exist before CUDA starts
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    vae_folder = settings.vae or settings.start
    if vae_folder:
        vae = AutoencoderKLQwenImage.from_pretrained(vae_folder, subfolder="vae", torch_dtype=torch.float32)
        flat = FlatVae()
        flat.unfold(vae)
    else:
        flat = train_vae(maker, settings)
    flat = flat.to(settings.device)
    training_set = maker.finish()
    note(f"{len(training_set.tokens)} scenes made")
    latents, mean, std = encode_all(flat, training_set.scenes, settings)
    save_frame(settings.out, vae=flat.fold(mean, std), tokenizer=build_tokenizer())
    train_transformer(latents, training_set, settings)
    note(f"saved {settings.out}")


def read_settings() -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, from the program's start")
    parser.add_argument("--minutes-vae", type=float, default=1.6, help="of these, for the VAE")
    parser.add_argument("--scenes", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batch-vae", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rate-vae", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="checkpoint whose VAE is kept; that of --start if not given")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="without CUDA graphs")
    return Settings(**vars(parser.parse_args()))


def note(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


class Clock:
    """How much of a stage's time is used, 0 to 1."""

    def __init__(self, end: float) -> None:
        self.start, self.end = time.monotonic(), end

    def used(self) -> float:
        return (time.monotonic() - self.start) / max(1e-3, self.end - self.start)


# --- VAE ----------------------------------------------------------------------------------------------------------


def train_vae(maker: Maker, settings: Settings) -> FlatVae:
    flat = FlatVae().to(settings.device, memory_format=torch.channels_last)
    trained = [parameter for parameter in flat.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, settings.device)
    stock = draw_stock(maker.scenes_so_far(min(8, len(maker.tasks))), settings.device)
    note(f"{len(stock)} pictures drawn for the VAE")

    def take_step() -> tuple[Tensor, Tensor]:
        pictures = pick_pictures(stock, settings.batch_vae)
        with torch.autocast(settings.device.type, torch.bfloat16):
            latents = flat.encode(pictures)
            decoded = flat.decode(latents + LATENT_NOISE * torch.randn_like(latents))
        loss, plain = vae_loss(decoded.float(), pictures, latents.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return plain.detach(), latents.detach().float().std()

    clock, step = Clock(time.monotonic() + 60 * settings.minutes_vae), 0
    repeated = Repeated(take_step, settings)
    while clock.used() < 1:
        set_rate(optimizer, step, 100, clock.used(), 0.3, settings.rate_vae)
        error, spread = repeated()
        if step % 500 == 0:
            note(f"vae {step}: error {error.item():.4f}, latents {spread.item():.2f}")
        step += 1
    note(f"vae done after {step} steps of {settings.batch_vae}")
    for parameter in flat.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as they will be stored
    return flat


@torch.no_grad()
def draw_stock(scenes: SceneBatch, device: torch.device) -> Tensor:
    """Pictures (N, 3, 256, 256), uint8; in every third one the colours are random."""
    stock = []
    for start in range(0, len(scenes.geometry), 500):
        part = scenes[slice(start, start + 500)].to(device)
        palettes = palette_tensor().to(device).repeat(len(part.geometry), 1, 1)
        palettes[::3] = torch.rand(palettes[::3].shape, device=device)
        stock.append((render(part, palettes) * 255).round().byte())
    return torch.cat(stock)


def pick_pictures(stock: Tensor, number: int) -> Tensor:
    """Random 128x128 crops (N, 3, 128, 128) in [-1, 1], half of them turned upside down."""
    device = stock.device
    index = torch.randint(len(stock), (number, 1, 1, 1), device=device)
    top, left = torch.randint(stock.shape[-1] - CROP + 1, (2, number, 1), device=device)
    span = torch.arange(CROP, device=device)
    rows = torch.where(torch.rand(number, 1, device=device) < 0.5, top + span, top + CROP - 1 - span)
    columns = left + span
    channels = torch.arange(3, device=device)[:, None, None]
    pictures = stock[index, channels, rows[:, None, :, None], columns[:, None, None, :]]
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def vae_loss(decoded: Tensor, pictures: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error, the same of the differences of neighbouring pixels, and a little of the latents' power."""
    plain = (decoded - pictures).abs().mean()
    error = decoded - pictures
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return plain + 0.5 * edges + 2 * error.square().mean() + 1e-3 * latents.square().mean(), plain


@torch.no_grad()
def encode_all(
    flat: FlatVae, scenes: SceneBatch, settings: Settings
) -> tuple[Tensor, list[float], list[float]]:
    """Packed, normalised latents (N, 256, 64) of all scenes, and the statistics they were normalised with."""
    size = min(1000, CHUNK)
    flat.to(memory_format=torch.channels_last)
    stored = torch.empty(
        len(scenes.geometry), GRID**2, 4 * LATENT_CHANNELS, dtype=torch.bfloat16, device=settings.device
    )
    mean = std = torch.zeros(0)
    for start in range(0, len(stored), size):
        part = scenes[slice(start, start + size)].to(settings.device)
        pictures = (render(part) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(settings.device.type, torch.bfloat16):
            latents = flat.encode(pictures).float()
        if start == 0:
            mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
            note(f"latents: mean {mean.mean():.3f}, deviation {std.min():.3f} to {std.max():.3f}")
        latents = (latents - mean[:, None, None]) / std[:, None, None]
        stored[start : start + size] = pack(latents).bfloat16()
    note("scenes encoded")
    return stored, mean.tolist(), std.tolist()


# --- text encoder and transformer ---------------------------------------------------------------------------------


class Learner(nn.Module):
    """Text encoder, transformer, and linear readers of the scene's facts at the last text token."""

    def __init__(
        self, text_encoder: Qwen2_5_VLForConditionalGeneration, transformer: QwenImageTransformer2DModel
    ):
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        self.readers = nn.Linear(TEXT_WIDTH, sum(FACT_CLASSES))

    def trained(self) -> list[nn.Parameter]:
        skipped = ".visual."
        return [parameter for name, parameter in self.named_parameters() if skipped not in name]


def train_transformer(latents: Tensor, training_set: TrainingSet, settings: Settings) -> None:
    """Saves the averaged weights of both models, at times and at the end."""
    device = settings.device
    learner, average = (make_learner(settings).to(device) for _ in range(2))
    average.load_state_dict(learner.state_dict())
    processor = RealRope()
    for block in learner.transformer.transformer_blocks:
        block.attn.processor = processor
    blocks = [compiled(block, settings) for block in learner.transformer.transformer_blocks]
    length = training_set.tokens.shape[-1]
    rope = joint_rope(learner.transformer, length, device)
    parameters, averages = learner.trained(), average.trained()
    optimizer = make_optimizer(parameters, device)
    classes = fact_classes(device)
    tensors = [
        tensor.to(device) for tensor in (training_set.tokens, training_set.facts, training_set.nothing)
    ]
    prefix = training_set.prefix.to(device)

    def take_step() -> tuple[Tensor, Tensor]:
        clean, tokens, facts = draw_batch(latents, *tensors, settings)
        sigma, noise = draw_sigmas(len(clean), device), torch.randn_like(clean)
        valid = tokens != training_set.padding
        with torch.autocast(device.type, torch.bfloat16):
            full = torch.cat([prefix.expand(len(tokens), -1), tokens], dim=1)
            text = encode_text(learner.text_encoder, full)[:, len(prefix) :].float()
            last = (valid.sum(dim=1) - 1)[:, None, None].expand(-1, 1, text.shape[2])
            reading = learner.readers(text.gather(1, last)[:, 0])
            mixed = torch.lerp(clean, noise, sigma[:, None, None])
            velocity = predict_velocity(
                learner.transformer, mixed, text, additive_mask(valid), sigma, rope, blocks
            )
        velocity_loss = F.mse_loss(velocity.float(), noise - clean)
        reading_loss = fact_loss(reading.float(), facts, classes)
        optimizer.zero_grad(set_to_none=True)
        (velocity_loss + 0.02 * reading_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_([p.data for p in averages], [p.data for p in parameters], AVERAGING)
        return velocity_loss.detach(), reading_loss.detach()

    clock, step = Clock(STARTED + 60 * settings.minutes), 0
    repeated = Repeated(take_step, settings)
    while clock.used() < 1:
        set_rate(optimizer, step, 300, clock.used(), 0.5, settings.rate)
        velocity_loss, reading_loss = repeated()
        if step % 500 == 0:
            note(f"transformer {step}: velocity {velocity_loss.item():.4f}, facts {reading_loss.item():.3f}")
            if not math.isfinite(velocity_loss.item()):
                raise RuntimeError("the loss is not finite; lower --rate")
        if step % 500 == 0 and clock.used() < 0.4:
            torch._foreach_copy_([p.data for p in averages], [p.data for p in parameters])
        if step % 3000 == 0:  # whatever ends the program, little is lost
            save_models(settings.out, text_encoder=average.text_encoder, transformer=average.transformer)
        step += 1
    save_models(settings.out, text_encoder=average.text_encoder, transformer=average.transformer)
    note(f"transformer done after {step} steps of {settings.batch}")


def make_learner(settings: Settings) -> Learner:
    torch.manual_seed(settings.seed + 1)
    if settings.start is None:
        return Learner(make_text_encoder(build_tokenizer()), make_transformer())
    return Learner(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(
            settings.start, subfolder="text_encoder", dtype=torch.float32
        ),
        QwenImageTransformer2DModel.from_pretrained(
            settings.start, subfolder="transformer", torch_dtype=torch.float32
        ),
    )


def draw_batch(
    latents: Tensor, tokens: Tensor, facts: Tensor, nothing: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, 256, 64), tokens (N, 48) and facts (N, 14); a tenth of the captions are empty or negative."""
    number, device = settings.batch, settings.device
    index = torch.randint(len(latents), (number,), device=device)
    chosen = tokens[index, torch.randint(tokens.shape[1], (number,), device=device)]
    dropped = torch.rand(number, device=device) < 0.1
    empty = nothing[torch.randint(len(nothing), (number,), device=device)]
    chosen = torch.where(dropped[:, None], empty, chosen).long()
    return latents[index].float(), chosen, facts[index].long().masked_fill(dropped[:, None], IGNORED)


def draw_sigmas(number: int, device: torch.device) -> Tensor:
    """Four fifths logit-normal, one fifth uniform, shifted as the scheduler shifts."""
    normal = torch.sigmoid(torch.randn(number, device=device) * 1.2)
    even = torch.rand(number, device=device)
    time = torch.where(torch.rand(number, device=device) < 0.2, even, normal)
    return SHIFT * time / (1 + (SHIFT - 1) * time)


def additive_mask(valid: Tensor) -> Tensor:
    """(N, L) to (N, 1, 1, L + 256): minus infinity at padding."""
    mask = torch.zeros(len(valid), valid.shape[1] + GRID**2, dtype=torch.bfloat16, device=valid.device)
    mask[:, : valid.shape[1]].masked_fill_(~valid, float("-inf"))
    return mask[:, None, None]


def fact_classes(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each fact the places of its classes in the reading, padded, and which are padding: both (14, 23)."""
    widest, start = max(FACT_CLASSES), 0
    places = torch.zeros(len(FACT_CLASSES), widest, dtype=torch.long)
    padding = torch.ones(len(FACT_CLASSES), widest, dtype=torch.bool)
    for row, number in enumerate(FACT_CLASSES):
        places[row, :number] = torch.arange(start, start + number)
        padding[row, :number] = False
        start += number
    return places.to(device), padding.to(device)


def fact_loss(reading: Tensor, facts: Tensor, classes: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropies of the 14 facts, summed, per picture."""
    places, padding = classes
    scores = reading[:, places].masked_fill(padding, -1e4)
    losses = F.cross_entropy(scores.flatten(0, 1), facts.flatten(), ignore_index=IGNORED, reduction="sum")
    return losses / len(facts)


# --- speed --------------------------------------------------------------------------------------------------------


class Repeated:
    """Runs a training step over and over; on a GPU as a CUDA graph, without the cost of launching each kernel."""

    def __init__(self, take_step: Callable[[], tuple[Tensor, Tensor]], settings: Settings) -> None:
        self.take_step, self.use_graph = take_step, settings.graph and settings.device.type == "cuda"
        self.on_gpu = settings.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[Tensor, Tensor] | None = None
        self.calls = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.on_gpu and self.calls % 10 == 0:
            torch.cuda.synchronize()  # the clock must not run ahead of the GPU
        if not self.use_graph:
            return self.take_step()
        if self.calls <= 5:
            return self.warm_up()
        if self.graph is None or self.result is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.take_step()
            note("step captured")
        self.graph.replay()
        return self.result

    def warm_up(self) -> tuple[Tensor, Tensor]:
        """One step on a side stream, as capture needs."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.take_step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        return result


def make_optimizer(parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    on_gpu = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu)


def set_rate(
    optimizer: torch.optim.Optimizer, step: int, warmup: int, used: float, hold: float, peak: float
) -> None:
    """Linear warm-up by steps, a plateau until `hold`, then down to nothing along a cosine by the clock."""
    falling = max(0.0, min(1.0, (used - hold) / (1 - hold)))
    rate = peak * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * falling))
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)


def compiled(function: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if settings.compile else function


if __name__ == "__main__":
    main()
