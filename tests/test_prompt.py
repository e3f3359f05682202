import diffusers
import pytest
import torch
from model_files import tiny_text_encoder, tiny_tokenizer, write_model

from diffusers_qwenimage.prompt import TEXT_TO_IMAGE, PromptEncoder, last_hidden_states, pad, unpad

CPU = torch.device("cpu")
PROMPTS = [
    "a red circle",
    "",
    "two big blue stars on a yellow background",
    "ein Bild, 図, \U0001f600 {braces}",
]


@pytest.fixture(scope="module")
def encoder():
    tokenizer = tiny_tokenizer()
    return tiny_text_encoder(len(tokenizer)).eval(), tokenizer


def test_template_is_that_of_diffusers(tmp_path):
    stock = diffusers.QwenImagePipeline.from_pretrained(write_model(tmp_path / "model"))
    assert stock.prompt_template_encode == TEXT_TO_IMAGE.text
    assert stock.prompt_template_encode_start_idx == TEXT_TO_IMAGE.prefix_tokens
    expected, mask = stock.encode_prompt(PROMPTS, device=CPU)
    got = PromptEncoder().encode(stock.text_encoder, stock.tokenizer, PROMPTS, device=CPU)
    padded, our_mask = pad(got)
    assert torch.equal(mask, our_mask)
    # Stock encodes the batch with padding, here each length goes alone: other shapes, other rounding.
    assert (padded - expected).abs().max() < 1e-5


def test_embeddings_do_not_depend_on_the_batch(encoder):
    together = PromptEncoder().encode(*encoder, PROMPTS, device=CPU)
    for prompt, embeds in zip(PROMPTS, together, strict=True):
        assert torch.equal(PromptEncoder().encode(*encoder, [prompt], device=CPU)[0], embeds)


def test_each_prompt_is_encoded_once(encoder):
    text_encoder, tokenizer = encoder
    calls = []
    handle = text_encoder.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    prompts = PromptEncoder()
    first = prompts.encode(text_encoder, tokenizer, ["a", "a", "a b c d"], device=CPU)
    assert len(calls) == 2
    again = prompts.encode(text_encoder, tokenizer, ["a b c d", "a"], device=CPU)
    assert len(calls) == 2
    assert again[0] is first[2] and again[1] is first[0]
    prompts.clear()
    prompts.encode(text_encoder, tokenizer, ["a"], device=CPU)
    handle.remove()
    assert len(calls) == 3


def test_changed_weights_or_another_encoder_are_noticed(encoder):
    _, tokenizer = encoder
    text_encoder = tiny_text_encoder(len(tokenizer)).eval()
    prompts = PromptEncoder()
    before = prompts.encode(text_encoder, tokenizer, ["a"], device=CPU)[0]
    with torch.no_grad():
        text_encoder.model.language_model.layers[0].mlp.down_proj.weight.add_(1.0)
    after = prompts.encode(text_encoder, tokenizer, ["a"], device=CPU)[0]
    assert not torch.allclose(before, after)
    other = tiny_text_encoder(len(tokenizer)).eval()
    assert torch.equal(prompts.encode(other, tokenizer, ["a"], device=CPU)[0], before)


def test_cache_is_bounded(encoder):
    prompts = PromptEncoder()
    prompts.encode(*encoder, [str(number) for number in range(100)], device=CPU)
    assert len(prompts._cache) == 64


def test_output_layer_and_vision_tower_are_not_needed(encoder):
    _, tokenizer = encoder
    text_encoder = tiny_text_encoder(len(tokenizer)).eval()
    expected = PromptEncoder().encode(text_encoder, tokenizer, ["a star"], device=CPU)[0]
    text_encoder.lm_head.to("meta")
    text_encoder.model.visual.to("meta")
    assert torch.equal(PromptEncoder().encode(text_encoder, tokenizer, ["a star"], device=CPU)[0], expected)


def test_hooks_on_the_whole_module_still_run(encoder):
    from accelerate import cpu_offload_with_hook

    _, tokenizer = encoder
    text_encoder = tiny_text_encoder(len(tokenizer)).eval()
    ids = torch.tensor([tokenizer(TEXT_TO_IMAGE.text.format("a star"))["input_ids"]])
    expected = last_hidden_states(text_encoder, ids)
    calls = []
    text_encoder, hook = cpu_offload_with_hook(text_encoder, "cpu")
    text_encoder.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(last_hidden_states(text_encoder, ids), expected)
    assert calls == [1]
    hook.remove()


def test_long_prompt_is_cut_with_a_warning(encoder, caplog):
    embeds = PromptEncoder().encode(*encoder, ["word " * 3000], device=CPU)[0]
    assert embeds.shape == (1024, 16)
    assert "tokens are cut off" in caplog.text


def test_a_tokenizer_that_is_not_qwens_is_refused(encoder, tmp_path):
    from transformers import Qwen2Tokenizer

    text_encoder, _ = encoder
    empty = Qwen2Tokenizer.from_pretrained(tmp_path)  # no files: no error, one token
    with pytest.raises(ValueError, match="instead of 34.*tokens known"):
        PromptEncoder().encode(text_encoder, empty, ["a"], device=CPU)


def test_text_that_is_none_is_refused(encoder):
    with pytest.raises(ValueError, match="no valid Unicode"):
        PromptEncoder().encode(*encoder, ["a \ud800"], device=CPU)
    with pytest.raises(ValueError, match="pass prompt_embeds"):
        PromptEncoder().encode(None, None, ["a"], device=CPU)


def test_pad_and_unpad_are_inverse():
    embeds = [torch.randn(length, 4) for length in (3, 5)]
    padded, mask = pad(embeds)
    assert padded.shape == (2, 5, 4) and mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    for a, b in zip(unpad(padded, mask), embeds, strict=True):
        assert torch.equal(a, b)
    assert pad([embeds[0], embeds[0]])[1] is None
    assert len(unpad(padded, None)) == 2


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 4), "must have the shape"),
        (torch.zeros(2, 5), "hides every token"),
        (torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), "Padding must come after"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        unpad(torch.zeros(2, 5, 4), mask)
