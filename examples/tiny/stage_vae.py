"""First stage: the VAE learns on crops around shapes; then all scenes are encoded."""

import time
from pathlib import Path

import torch
from data import CHUNK, Made, Maker
from diffusers import AutoencoderKLQwenImage
from flat_vae import LATENT_CHANNELS, LATENT_NOISE, FlatVae, pack
from grammar import MAX_SHAPES, SHAPES
from models import GRID
from scenes import CANVAS, SceneBatch, palette_tensor, render
from settings import Settings, note
from speed import Clock, Repeated, make_optimizer, set_rate
from torch import Tensor, nn

CROP = 96
CROP_SHIFT = 40.0  # of a crop's middle from the middle of a shape, at most


def load_vae(folder: Path) -> FlatVae:
    vae = AutoencoderKLQwenImage.from_pretrained(str(folder), subfolder="vae", torch_dtype=torch.float32)
    flat = FlatVae()
    flat.unfold(vae)
    return flat


def train_vae(flat: FlatVae, maker: Maker | Made, settings: Settings) -> FlatVae:
    flat = flat.to(settings.device, memory_format=torch.channels_last)
    trained = [parameter for parameter in flat.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, settings.device)
    scenes = maker.scenes_so_far(min(8, len(maker.tasks))).to(settings.device)
    stock = draw_stock(scenes, settings.device)
    chances = crop_chances(scenes)
    note(f"{len(stock)} pictures drawn for the VAE")

    def take_step() -> tuple[Tensor, Tensor]:
        pictures = pick_crops(stock, scenes, chances, settings.batch_vae)
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
    """Pictures (N, 3, 256, 256), uint8; in every fourth one the colours are random."""
    stock = []
    for start in range(0, len(scenes.geometry), 500):
        part = scenes[slice(start, start + 500)].to(device)
        palettes = palette_tensor().to(device).repeat(len(part.geometry), 1, 1)
        palettes[::4] = torch.rand(palettes[::4].shape, device=device)
        stock.append((render(part, palettes) * 255).round().byte())
    return torch.cat(stock)


def crop_chances(scenes: SceneBatch) -> Tensor:
    """Cumulative chances (N * 6,) of the shapes to be a crop's middle: small ones more, stars even more."""
    radius = scenes.geometry[..., 2].clamp(min=1)
    stars = 1 + 2 * (scenes.shape == SHAPES.index("star"))
    chances = torch.where(scenes.shape >= 0, stars / radius, 0).double().flatten().cumsum(0)
    return (chances / chances[-1]).float()


def pick_crops(stock: Tensor, scenes: SceneBatch, chances: Tensor, number: int) -> Tensor:
    """Random 96x96 crops (N, 3, 96, 96) in [-1, 1] near a shape, half of them turned upside down."""
    device = stock.device
    drawn = torch.searchsorted(chances, torch.rand(number, device=device)).clamp(max=len(chances) - 1)
    index, slot = drawn // MAX_SHAPES, drawn % MAX_SHAPES
    middle = scenes.geometry[index, slot, :2] + CROP_SHIFT * (2 * torch.rand(number, 2, device=device) - 1)
    left, top = (middle - CROP / 2).clamp(0, CANVAS - CROP).long().T[:, :, None]
    index = index[:, None, None, None]
    span = torch.arange(CROP, device=device)
    rows = torch.where(torch.rand(number, 1, device=device) < 0.5, top + span, top + CROP - 1 - span)
    columns = left + span
    channels = torch.arange(3, device=device)[:, None, None]
    pictures = stock[index, channels, rows[:, None, :, None], columns[:, None, None, :]]
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def vae_loss(decoded: Tensor, pictures: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute and squared error, error of neighbours' differences, a little of the latents' power."""
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
