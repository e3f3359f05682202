"""Plans of whole pipelines, at the true widths and without weights."""

import random
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_qwenimage import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers_qwenimage.pipelines.needs import Demand, decode_bytes, fitting_tile
from diffusers_qwenimage.pipelines.vram import HOST_RESERVE, VramManager
from diffusers_qwenimage.pipelines.vram_plan import Parts, plan_pipeline
from diffusers_qwenimage.quantize import quantize_

GIB = 2**30
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 4,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
VISION = {"hidden_size": 128, "depth": 2, "out_hidden_size": 3584, "intermediate_size": 256}


def parts(weights: str) -> Parts:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=8)
        config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        vae = AutoencoderKLQwenImage()
    modules: tuple[Any, ...] = (transformer, text_encoder, vae)
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    if weights != "bf16":
        quantize_(transformer, weights)
    return Parts(transformer=transformer, text_encoder=text_encoder, vae=vae)


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def model(request: pytest.FixtureRequest) -> Parts:
    return parts(request.param)


def random_demand(draw: random.Random) -> Demand:
    return Demand(
        rows=draw.randint(8, 128),
        columns=draw.randint(8, 128),
        pictures=draw.randint(1, 4),
        guided=draw.random() < 0.7,
        text_tokens=draw.randint(1, 1024),
        steps=draw.randint(1, 60),
        reference_tokens=draw.choice([0, 0, 4096]),
    )


def test_no_plan_exceeds_its_budget(model: Parts) -> None:
    draw = random.Random(0)
    refused = 0
    for _ in range(50):
        demand = random_demand(draw)
        budget = round(draw.uniform(0.6, 12) * GIB)
        try:
            plan = plan_pipeline(model, budget, demand, device="cuda:0")
        except ValueError as error:
            assert "the smallest budget that works is" in str(error)
            smallest = plan_pipeline(model, 0, demand, device="cuda:0", strict=False)
            assert smallest.peak_bytes > budget
            refused += 1
            continue
        assert plan.smallest_bytes <= plan.peak_bytes <= budget
    assert 1 < refused < 40


def test_more_memory_never_streams_more(model: Parts) -> None:
    plans = [
        plan_pipeline(model, int(gib * GIB), Demand(rows=64, columns=64), device="cuda:0")
        for gib in (3, 4, 6, 8, 24)
    ]
    streamed = [plan.transformer.streamed_bytes for plan in plans if plan.transformer]
    assert streamed == sorted(streamed, reverse=True) and streamed[-1] == 0 < streamed[0]
    assert plans[-1].vae_stays and plans[-1].tile is None
    assert plans[-1].host_bytes == 0


def test_the_text_encoder_gives_way_first_when_host_memory_is_short(
    model: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand = Demand(rows=64, columns=64)
    manager = VramManager(lambda: model, torch.device("cpu"), budget=3 * GIB)
    pinned = manager._plan_for(model, demand)
    assert pinned.transformer is not None and pinned.text_encoder is not None
    for missing, sources in (
        (-1, ("pinned", "pinned")),
        (1, ("pinned", "mapped")),
        (pinned.host_bytes, ("mapped", "mapped")),
    ):
        memory = psutil.virtual_memory()._replace(available=pinned.host_bytes - missing + HOST_RESERVE)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        plan = manager._plan_for(model, demand)
        assert plan.transformer is not None and plan.text_encoder is not None
        assert (plan.transformer.source, plan.text_encoder.source) == sources
        assert plan.transformer.blocks == pinned.transformer.blocks


def test_memory_is_used(model: Parts) -> None:
    """Within a group of weights and a slot of the budget, as long as something streams."""
    for gib in (2.5, 3, 4):
        plan = plan_pipeline(model, int(gib * GIB), Demand(rows=64, columns=64), device="cuda:0")
        assert plan.transformer is not None
        if plan.transformer.streamed_bytes:
            assert plan.peak_bytes > 0.85 * gib * GIB


def test_what_the_transformer_leaves_holds_the_text_encoder(model: Parts) -> None:
    """Where the transformer fits: with more memory less of the text encoder streams, and none is wasted."""
    demand = Demand(rows=32, columns=32, steps=4)
    resident = plan_pipeline(model, None, demand, device="cuda:0").transformer
    assert resident is not None
    of_text = []
    for more in (1.4, 2.2, 2.6, 4.0):
        budget = resident.resident_bytes + round(more * GIB)
        plan = plan_pipeline(model, budget, demand, device="cuda:0")
        assert plan.transformer is not None and plan.text_encoder is not None
        assert plan.transformer.streamed_bytes == 0 and plan.peak_bytes <= budget
        assert plan.tile is None and plan.vae_stays
        of_text.append(plan.text_encoder.streamed_bytes)
        if of_text[-1]:
            assert plan.peak_bytes > budget - GIB // 4  # a group of one layer, and what slots differ by
    assert of_text[0] > of_text[1] > of_text[2] > of_text[3] == 0


def test_pictures_are_decoded_together_where_that_fits(model: Parts) -> None:
    one, four = (Demand(rows=64, columns=64, pictures=number) for number in (1, 4))
    alone, together = (plan_pipeline(model, None, demand, device="cuda:0") for demand in (one, four))
    assert together.decode_bytes == 4 * alone.decode_bytes
    short = plan_pipeline(model, together.peak_bytes - 1, four, device="cuda:0")
    assert short.decode_bytes <= alone.decode_bytes and short.peak_bytes < together.peak_bytes


def test_fused_paths_need_less(model: Parts) -> None:
    demand = Demand(rows=64, columns=64)
    fused, plain = (
        plan_pipeline(model, None, demand, device="cuda:0", fused=fused) for fused in (True, False)
    )
    assert fused.denoise_bytes < plain.denoise_bytes and fused.decode_bytes < plain.decode_bytes


def test_a_demand_that_is_joined_covers_both() -> None:
    draw = random.Random(1)
    for _ in range(100):
        a, b = random_demand(draw), random_demand(draw)
        assert a.joined(b).covers(a) and a.joined(b).covers(b) and a.covers(a)


def test_tiles_become_smaller_as_memory_does(model: Parts) -> None:
    whole = decode_bytes(model.vae, 166, 166)
    assert fitting_tile(model.vae, 166, 166, whole) is None
    sides = [fitting_tile(model.vae, 166, 166, int(share * whole)) for share in (0.9, 0.5, 0.2, 0.01)]
    assert sides == sorted(sides, key=lambda side: -(side or 0)) and sides[-1] == 32
    for side in sides[:-1]:
        assert side is not None and decode_bytes(model.vae, 166, 166, tile=side) <= whole
