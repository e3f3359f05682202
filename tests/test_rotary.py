import gc
import weakref

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import (
    QwenEmbedLayer3DRope,
    QwenEmbedRope,
    apply_rotary_emb_qwen,
)

from diffusers_qwenimage.rotary import LayeredRotaryEmbedding, RotaryEmbedding, rotate, shapes_of_batch

AXES = (16, 56, 56)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "ours, stock", [(RotaryEmbedding, QwenEmbedRope), (LayeredRotaryEmbedding, QwenEmbedLayer3DRope)]
)
@pytest.mark.parametrize("shapes", [[(1, 5, 8)], [(1, 4, 6), (1, 3, 7), (1, 9, 2)], [(1, 83, 83), (1, 1, 1)]])
def test_tables_and_rotation_equal_diffusers(ours, stock, shapes):
    image, text = ours(AXES)(shapes, 13, CPU)
    stock_image, stock_text = stock(theta=10000, axes_dim=list(AXES), scale_rope=True)(
        [shapes], max_txt_seq_len=13, device=CPU
    )
    assert torch.equal(image, torch.view_as_real(stock_image))
    assert torch.equal(text, torch.view_as_real(stock_text))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, len(image), 3, 128, dtype=dtype)
        assert torch.equal(rotate(x, image), apply_rotary_emb_qwen(x, stock_image, use_real=False))


def test_text_longer_than_diffusers_table():
    _, text = RotaryEmbedding(AXES)([(1, 4, 4)], 5000, CPU)
    assert text.shape == (5000, 64, 2)
    assert torch.isfinite(text).all()


def test_nothing_is_lost_on_the_meta_device():
    with torch.device("meta"):
        embedding = RotaryEmbedding(AXES)
    image, _ = embedding.to_empty(device="cpu")([(1, 4, 4)], 3, CPU)
    assert torch.equal(image, RotaryEmbedding(AXES)([(1, 4, 4)], 3, CPU)[0])


def test_cast_does_not_round_the_tables():
    image, _ = RotaryEmbedding(AXES).to(torch.bfloat16)([(1, 4, 4)], 3, CPU)
    assert image.dtype == torch.float32


def test_cache_is_bounded_and_keeps_no_module_alive():
    embedding = RotaryEmbedding(AXES)
    for rows in range(1, 40):
        embedding([(1, rows, 2)], 3, CPU)
    assert len(embedding._tables) <= 16
    alive = weakref.ref(embedding)
    del embedding
    gc.collect()
    assert alive() is None


def test_odd_axes_are_refused():
    with pytest.raises(ValueError, match="even"):
        RotaryEmbedding((15, 57, 56))


@pytest.mark.parametrize(
    "img_shapes", [[(1, 4, 6), (1, 4, 6)], [[(1, 4, 6)], [(1, 4, 6)]], [[(1, 2, 6), (1, 2, 6)]] * 2]
)
def test_shapes_of_batch(img_shapes):
    assert sum(rows * columns for _, rows, columns in shapes_of_batch(img_shapes, 24)) == 24


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="24 tokens, but hidden_states has 25"):
        shapes_of_batch([[(1, 4, 6)]], 25)
    with pytest.raises(ValueError, match="same shapes"):
        shapes_of_batch([[(1, 4, 6)], [(1, 6, 4)]], 24)
