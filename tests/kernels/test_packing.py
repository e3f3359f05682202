"""bf16 words packed and unpacked: every word comes back as it was, with the kernels and without."""

import pytest
import torch
from fused_cases import DEVICE, TRITON, needs_triton

from diffusers_qwenimage.kernels import packing, use_backend
from diffusers_qwenimage.kernels.packing import CHUNK, pack, packed_bytes, unpack, unpack_reference

EVERY_WORD = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def normal(count, scale=0.02):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)) * scale
    return values.to(torch.bfloat16).view(torch.int16)


CASES = {
    "normal": normal(5 * CHUNK),
    "a part of a chunk": normal(3 * CHUNK + 17),
    "one word": normal(1),
    "nothing": normal(0),
    "zeros": torch.zeros(CHUNK + 1, dtype=torch.int16),
    "every word": EVERY_WORD,
    "every word, mixed": EVERY_WORD[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))],
    "tiny numbers": normal(CHUNK, 1e-40),
    "huge numbers": normal(CHUNK, 1e37),
}


def packed_of(words, most_listed=None):
    count = words.numel() if most_listed is None else most_listed
    return pack(words, torch.zeros(packed_bytes(words.numel(), count), dtype=torch.uint8))


def unpacked(words, way):
    packed = packed_of(words.to(DEVICE))
    out = torch.full_like(words, 99, device=DEVICE)
    way(packed, packed.memory.to(DEVICE), out)
    return out.cpu()


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_words_come_back(words):
    assert torch.equal(unpacked(words, unpack_reference), words)


@needs_triton
@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_words_come_back_from_the_kernel(words):
    with use_backend(TRITON):
        assert torch.equal(unpacked(words, unpack), words)


def test_pieces_are_joined(monkeypatch):
    words = EVERY_WORD.repeat(2)
    whole = packed_of(words)
    monkeypatch.setattr(packing, "_PIECE", 4 * CHUNK)
    pieces = packed_of(words)
    assert whole.num_listed == pieces.num_listed
    assert torch.equal(whole.memory, pieces.memory)


def test_size_of_normal_weights():
    words = normal(400 * CHUNK)
    packed = packed_of(words)
    # A half and a quarter of 2 bytes a word, a base per chunk, and 1 in 10,000 words listed (6 bytes each).
    assert packed.memory.numel() < 0.752 * words.nbytes
    assert 0 < packed.num_listed < words.numel() / 2000


def test_too_many_words_to_list():
    assert packed_of(EVERY_WORD, 1000) is None
    words = normal(100 * CHUNK)
    number = packed_of(words).num_listed
    assert packed_of(words, number) is not None
