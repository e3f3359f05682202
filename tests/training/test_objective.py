"""The objective against its formula, and one step of training against plain torch on stock diffusers."""

import math

import diffusers
import pytest
import torch
from peft import LoraConfig
from training_data import TARGETS, config, make_trainer, random_picture

from diffusers_qwenimage.training.data import cover, to_pixels
from diffusers_qwenimage.training.objective import Objective, reference_sigmas
from diffusers_qwenimage.training.plan import Slot
from diffusers_qwenimage.training.randomness import Stream, generator

SCHEDULER = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "checkpointing", ["", "use_gradient_checkpointing", "use_gradient_checkpointing_offload"]
)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loss_and_gradients_against_diffusers(workplace, kind, batch, checkpointing, cached):
    settings = {checkpointing: True} if checkpointing else {}
    if kind == "full":
        settings["trainable_models"] = "dit"
    trainer = make_trainer(batch_size=batch, cache=cached, **settings)
    slots = [Slot(index=i, counter=10 + i) for i in range(batch)]
    parameters = trainer.trained.parameters
    loss, _ = trainer.learner.loss(slots)
    loss.backward()

    stock = stock_transformer(trainer, kind)
    expected = stock_loss(stock, trainer, slots)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    compared = 0
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            ours = parameters[f"dit.{name}"].grad
            assert (ours is None) == (parameter.grad is None), name
            if ours is not None:
                compared += 1
                # fp32, another order of additions (text packed instead of padded)
                torch.testing.assert_close(
                    ours, parameter.grad, rtol=1e-5, atol=1e-5 * parameter.grad.abs().max().item()
                )
    assert compared > (40 if kind == "lora" else 60)


def stock_transformer(trainer, kind):
    folder = "models/Qwen/Qwen-Image"
    stock = diffusers.QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    if kind == "full":
        return stock.train()
    stock.requires_grad_(False)
    stock.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS.split(",")))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trainer.trained.parameters[f"dit.{name}"])
    return stock.train()


def stock_loss(transformer, trainer, slots):
    """The documented objective, written out once more on diffusers' modules."""
    pipe = diffusers.QwenImagePipeline.from_pretrained("models/Qwen/Qwen-Image", transformer=None)
    losses = []
    shifted = [1 / (1 + (1 / (1 - i / 1000) - 1) / math.exp(0.8)) for i in range(1000)]
    sigmas = [1 - (1 - s) * 0.98 / (1 - shifted[-1]) for s in shifted]
    bell = [math.exp(-2 * (s - 0.5) ** 2) for s in sigmas]
    lowest = min(bell)
    total = sum(y - lowest for y in bell)
    weights = [1000 * (y - lowest) / total for y in bell]
    for slot in slots:
        pixels = to_pixels(random_picture((48, 32), slot.index))[:, :, None]
        mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
        with torch.no_grad():
            latents = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
            embeds, mask = pipe.encode_prompt(f"a picture, number {slot.index}")
        clean = pipe._pack_latents(latents, 1, 16, 4, 6)
        draw = generator(trainer.config.seed, Stream.NOISE, slot.counter)
        index = int(torch.randint(1000, (1,), generator=draw))
        noise = torch.randn(clean.shape[1:], generator=draw)[None]
        sigma = sigmas[index]
        velocity = transformer(
            hidden_states=(1 - sigma) * clean + sigma * noise,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=torch.tensor([sigma]),
            img_shapes=[[(1, 2, 3)]],
            return_dict=False,
        )[0]
        losses.append(weights[index] * (velocity - (noise - clean)).square().mean())
    return torch.stack(losses).mean()


def test_reference_grid_has_the_known_moments():
    sigmas = reference_sigmas(0.8)
    weights = Objective(config=config(), scheduler_config=SCHEDULER).weight(sigmas)
    assert sigmas[0] == 1 and sigmas[-1] == pytest.approx(0.02, abs=1e-6)
    assert sigmas.mean().item() == pytest.approx(0.638, abs=5e-4)
    assert (sigmas > 0.5).float().mean().item() == pytest.approx(0.698, abs=1e-3)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights.max().item() == pytest.approx(1.6826, abs=1e-4)
    assert weights[0].item() == pytest.approx(0, abs=1e-6)
    assert weights[-1].item() == pytest.approx(0.104, abs=1e-3)


def test_sampling_options():
    draw = generator(0, Stream.NOISE, 0)
    kinds = {
        "uniform": {"timestep_sampling": "uniform"},
        "logit_normal": {"timestep_sampling": "logit_normal", "logit_mean": 1.0},
        "shifted": {"timestep_sampling": "uniform", "timestep_shift": 1.0},
        "resolution": {"timestep_sampling": "uniform", "resolution_shift": True},
    }
    means = {}
    for name, settings in kinds.items():
        objective = Objective(config=config(**settings), scheduler_config=SCHEDULER)
        sigmas = torch.cat([objective.draw_sigma(4096, draw) for _ in range(4000)])
        assert 0 < sigmas.min() and sigmas.max() < 1
        means[name] = sigmas.mean().item()
    assert means["uniform"] == pytest.approx(0.5, abs=0.02)
    # The mean of sigmoid(1 + n) and that of the shifted uniform, by integration.
    assert means["logit_normal"] == pytest.approx(0.6967, abs=0.02)
    assert means["shifted"] == pytest.approx(shifted_mean(1.0), abs=0.02)
    assert means["resolution"] == pytest.approx(shifted_mean(0.69355), abs=0.02)


def shifted_mean(mu):
    points = [(i + 0.5) / 10000 for i in range(10000)]
    return sum(math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in points) / len(points)


def test_min_snr_weight():
    objective = Objective(config=config(loss_weighting="min_snr"), scheduler_config=SCHEDULER)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(objective.weight(sigma), torch.tensor([5 * 0.01, 0.25, 0.01]))


def test_cover_against_the_reference():
    """DiffSynth: torchvision's resize to (round(h s), round(w s)), bilinear, then its centre crop."""
    picture = random_picture((50, 33))
    scale = max(32 / 50, 32 / 33)
    resized = picture.resize((round(50 * scale), round(33 * scale)), 2)
    left = int(round((resized.width - 32) / 2.0))
    assert cover(picture, (32, 32)).tobytes() == resized.crop((left, 0, left + 32, 32)).tobytes()
