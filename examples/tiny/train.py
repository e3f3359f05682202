"""Train the small checkpoint from nothing: first the VAE, then text encoder and transformer together.

    python train.py OUT --minutes 9                       # on one H100
    python train.py OUT --start OLD --minutes 5           # go on from a checkpoint, with its VAE
    python train.py OUT --vae OLD --minutes-vae 1.3       # train OLD's VAE further, the rest anew
    python train.py OUT --data FILE                       # scenes that data.py made beforehand

The learning rates follow the clock: the VAE stops after its minutes, the transformer when all minutes
are used. Seeds are fixed; the number of steps depends on the machine.
"""

import math

import torch
import torch.nn.functional as F
from data import FACT_CLASSES, IGNORED, Made, Maker, TrainingSet
from diffusers import QwenImageTransformer2DModel
from flat_vae import FlatVae
from models import (
    GRID,
    TEXT_WIDTH,
    RealRope,
    encode_text,
    joint_rope,
    make_text_encoder,
    make_transformer,
    predict_velocity,
    save_frame,
    save_models,
)
from settings import STARTED, Settings, compiled, note, read_settings
from speed import Clock, Repeated, make_optimizer, set_rate
from stage_vae import encode_all, load_vae, train_vae
from tokenizer import build_tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

AVERAGING = 0.0008  # weight of the newest weights in the average
SHIFT = math.exp(0.5)  # of the sigmas, as the scheduler shifts them for 256 image tokens


def main() -> None:
    settings = read_settings(__doc__)
    maker = Made(settings.data) if settings.data else Maker(settings.scenes, settings.seed)
    maker.scenes_so_far(1)  # the processes exist before CUDA starts
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.suppress_errors = True  # what does not compile runs as it is
    flat = load_vae(settings.vae) if settings.vae else FlatVae()
    flat = train_vae(flat, maker, settings) if settings.minutes_vae > 0 else flat
    flat = flat.to(settings.device)
    training_set = maker.finish()
    note(f"{len(training_set.tokens)} scenes made")
    latents, mean, std = encode_all(flat, training_set.scenes, settings)
    save_frame(settings.out, vae=flat.fold(mean, std), tokenizer=build_tokenizer())
    train_transformer(latents, training_set, settings)
    note(f"saved {settings.out}")


# --- text encoder and transformer ---


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
    all_tokens, all_facts = training_set.tokens.to(device), training_set.facts.to(device)
    nothing = training_set.nothing.to(device)
    prefix = training_set.prefix.to(device)

    def take_step() -> tuple[Tensor, Tensor]:
        clean, tokens, facts = draw_batch(latents, all_tokens, all_facts, nothing, settings)
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
    """Latents (N, 256, 64), tokens (N, 48), facts (N, 14); a tenth of the captions are empty or negative."""
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
    """For each fact the places of its classes in the reading, padded, and which are padding: (14, 23)."""
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


if __name__ == "__main__":
    main()
