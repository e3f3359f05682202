"""The tools that make and judge the small checkpoint, without its weights."""

import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny"))

import data
from flat_vae import FlatVae
from grammar import (
    SHAPES,
    Caption,
    Group,
    Scene,
    default_background,
    is_held_out,
    sample_scene,
    write_caption,
)
from judge import judge
from models import RealRope, encode_text, joint_rope, make_text_encoder, make_transformer, predict_velocity
from scenes import SceneBatch, batch_scenes, lay_out, render
from stage_vae import crop_chances
from tokenizer import PREFIX_TOKENS, SUFFIX_TOKENS, TEMPLATE, build_tokenizer, save_tokenizer
from transformers import Qwen2Tokenizer

Drawing = tuple[Scene, Caption, np.ndarray]


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    rng = random.Random(20)
    scenes = [sample_scene(rng) for _ in range(60)]
    captions = [write_caption(scene, rng) for scene in scenes]
    pictures = render(batch_scenes([(scene.background, lay_out(scene, rng)) for scene in scenes]))
    pixels = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return list(zip(scenes, captions, pixels, strict=True))


def test_judge_accepts_what_the_caption_says(drawings: list[Drawing]) -> None:
    for scene, caption, picture in drawings:
        verdict = judge(picture, scene, caption)
        assert verdict.right, (caption.text, verdict)


def test_judge_refuses_the_picture_of_another_caption(drawings: list[Drawing]) -> None:
    for (scene, caption, _), (_, _, picture) in zip(drawings, drawings[1:], strict=False):
        assert not judge(picture, scene, caption).right, caption.text


def draw(groups: list[Group], arrangement: tuple[str, ...], background: str = "white") -> np.ndarray:
    scene = Scene(background=background, groups=tuple(groups), arrangement=arrangement)
    picture = render(batch_scenes([(background, lay_out(scene, random.Random(0)))]))[0]
    return np.asarray((picture * 255).round().byte().permute(1, 2, 0))


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"shape": "star"}, "shape"),
        ({"colour": "orange"}, "colour"),
        ({"size": "small"}, "size"),
        ({"count": 2}, "count"),
    ],
)
def test_judge_names_the_fault(changed: dict[str, object], fault: str) -> None:
    wanted = Group(shape="circle", colour="red", size="big", count=1)
    other = Group(shape="square", colour="blue", size="big", count=1)
    scene = Scene(background="white", groups=(wanted, other), arrangement=("left",))
    caption = Caption(text="", relations=((0, "left", 1),))
    assert judge(draw([wanted, other], ("left",)), scene, caption).right
    wrong = Group(**{**vars(wanted), **changed})
    assert fault in judge(draw([wrong, other], ("left",)), scene, caption).faults
    assert judge(draw([wanted, other], ("right",)), scene, caption).faults == ("relation left",)
    assert judge(draw([wanted, other], ("left",), "yellow"), scene, caption).faults == ("background",)
    swapped = [Group(**{**vars(wanted), "colour": "blue"}), Group(**{**vars(other), "colour": "red"})]
    assert judge(draw(swapped, ("left",)), scene, caption).faults == ("binding",)


def test_scenes_keep_the_rules() -> None:
    rng = random.Random(1)
    for held_out in (False, True):
        for _ in range(100):
            scene = sample_scene(rng, held_out=held_out)
            assert is_held_out(scene) == held_out
            assert scene.background not in {group.colour for group in scene.groups}
    white = Group(shape="star", colour="white", size="big", count=1)
    assert default_background((white,)) == "gray"


def test_template_has_34_prefix_tokens_and_any_text_survives(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, tmp_path)
    loaded = Qwen2Tokenizer.from_pretrained(tmp_path)
    prefix, suffix = TEMPLATE.split("{}")
    assert len(loaded(prefix).input_ids) == PREFIX_TOKENS
    assert len(loaded(suffix).input_ids) == SUFFIX_TOKENS
    text = TEMPLATE.format("Two RED stars, déjà vu 漢字 🙂")
    assert loaded.decode(loaded(text).input_ids) == text
    words = "a small Red CIRCLE to the left of four triangles, gray background."
    assert len(loaded.tokenize(words)) == 14


def test_flat_vae_is_the_stock_vae_on_one_frame() -> None:
    torch.manual_seed(0)
    flat = FlatVae()
    stock = flat.fold([0.0] * 16, [1.0] * 16)
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = flat.encode(pictures)
        # The same sums in another order: float32 rounding.
        torch.testing.assert_close(
            stock.encode(pictures[:, :, None]).latent_dist.mean[:, :, 0], latents, atol=1e-4, rtol=1e-4
        )
        decoded = stock.decode(latents[:, :, None]).sample[:, :, 0]
        torch.testing.assert_close(decoded, flat.decode(latents).clamp(-1, 1), atol=2e-4, rtol=1e-4)
    again = FlatVae()
    again.unfold(stock)
    assert torch.equal(again.encoder.conv_in.weight, flat.encoder.conv_in.weight)


def test_training_forward_is_the_stock_forward() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder, transformer = make_text_encoder(tokenizer), make_transformer()
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    texts = [TEMPLATE.format(text) for text in ("a red circle", "two small stars above a heart")]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch.attention_mask[:, PREFIX_TOKENS:].bool()
    latents, sigma = torch.randn(2, 256, 64), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        states = encoder(**batch, output_hidden_states=True).hidden_states[-1]
        text = encode_text(encoder, batch.input_ids)
        # Float32 rounding of two attention kernels.
        torch.testing.assert_close(
            text[batch.attention_mask.bool()], states[batch.attention_mask.bool()], atol=1e-5, rtol=1e-4
        )
        text = text[:, PREFIX_TOKENS:]
        stock = transformer(
            hidden_states=latents,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[(1, 16, 16)]] * 2,
            return_dict=False,
        )[0]
        rope = joint_rope(transformer, mask.shape[1], latents.device)
        for block in transformer.transformer_blocks:
            block.attn.processor = RealRope()
        everything = torch.cat([mask, torch.ones(2, 256, dtype=torch.bool)], dim=1)
        additive = torch.zeros(2, 1, 1, everything.shape[1])
        additive.masked_fill_(~everything[:, None, None], float("-inf"))
        blocks = list(transformer.transformer_blocks)
        ours = predict_velocity(transformer, latents, text, additive, sigma, rope, blocks)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


def test_a_set_made_beforehand_is_the_one_made_while_training(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 20)  # inherited by the processes, which are forked
    monkeypatch.setattr(
        data, "ProcessPoolExecutor", partial(ProcessPoolExecutor, mp_context=get_context("fork"))
    )
    data.save_set(tmp_path / "set.npz", 40, seed=3)
    made, now = data.Made(tmp_path / "set.npz").finish(), data.Maker(40, seed=3).finish()
    for name in ("tokens", "facts", "nothing", "prefix"):
        assert torch.equal(getattr(made, name), getattr(now, name))
    assert torch.equal(made.scenes.shape, now.scenes.shape)
    assert (made.scenes.geometry - now.scenes.geometry).abs().max() <= 0.125
    assert (made.scenes.shape >= 0).sum(dim=1).max() <= 6


def test_crops_are_near_small_stars_more_often():
    shape = torch.tensor([[SHAPES.index("circle"), SHAPES.index("star"), -1, -1, -1, -1]], dtype=torch.int8)
    geometry = torch.tensor([[[50.0, 50.0, 20.0], [180.0, 180.0, 20.0]] + [[0.0] * 3] * 4])
    zero = torch.zeros(1, dtype=torch.int8)
    chances = crop_chances(SceneBatch(geometry=geometry, shape=shape, colour=shape, background=zero))
    assert torch.allclose(chances, torch.tensor([0.25, 1, 1, 1, 1, 1]))
