"""bf16 values in three quarters of their bytes, without loss: for memory that is copied over a slow link.

A bf16 word is a sign, 8 bits of exponent and 7 of mantissa. The weights of a layer differ by many thousand
times at most, so that among neighbours a few exponents are common: of each chunk of 2048 words, the 15 up to
the largest one are written as codes of 4 bits, counted from a base. Words with another exponent (about one in
ten thousand normally distributed ones) get the code 15 and are listed: their places and what they are.

    word = sign | (base + code) << 7 | mantissa

Packed memory is five stretches, in this order: a byte per word with sign and mantissa; codes, where byte j of
a chunk's 1024 holds those of its words j (low half) and j + 1024; a base per chunk; places of listed words
(int32); the words themselves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend, triton_is_installed
from .launch import Launcher

if triton_is_installed():
    import triton
    import triton.language as tl

CHUNK = 2048  # words with one base
_HALF = CHUNK // 2
_CODES = 15  # of exponents; the next one says that the word is listed
_PIECE = 2**22  # words that are packed at a time, whole chunks: temporary memory is 20 bytes of each
_LISTED = 256  # listed words of a program
_ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Packed words.

    Attributes:
        memory: uint8, the five stretches.
        num_words: how many words they were.
        num_listed: how many of them are listed.
    """

    memory: Tensor
    num_words: int
    num_listed: int

    def parts(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Within a copy of `memory`: bytes, codes, bases (all uint8), places (int32), words (int16)."""
        sizes = _sizes(self.num_words, self.num_listed)
        starts = [sum(map(_aligned, sizes[:index])) for index in range(len(sizes))]
        low, codes, bases, places, words = (
            memory[start : start + size] for start, size in zip(starts, sizes, strict=True)
        )
        return low, codes, bases, places.view(torch.int32), words.view(torch.int16)


# 1. Packing


@torch.no_grad()
def pack(words: Tensor, into: Tensor) -> Packed | None:
    """Pack bf16 words given as int16 [n], on their device; None if there is no room for those to be listed.

    Args:
        words: what is packed.
        into: uint8 memory anywhere, of `packed_bytes(n, number of words that may be listed)`.
    """
    num_words, start = words.numel(), 0
    low, codes, bases, *_ = Packed(memory=into, num_words=num_words, num_listed=0).parts(into)
    listed = []
    while start < num_words:
        piece = words[start : start + _PIECE]
        of_low, of_codes, of_bases, places = _pack_piece(piece)
        low[start : start + len(of_low)] = of_low
        codes[start // 2 : start // 2 + len(of_codes)] = of_codes
        bases[start // CHUNK : start // CHUNK + len(of_bases)] = of_bases
        listed.append(places + start)
        start += _PIECE
    places = torch.cat(listed) if listed else words.new_empty(0, dtype=torch.int64)
    num_bytes = packed_bytes(num_words, len(places))
    if num_bytes > into.numel():
        return None
    packed = Packed(memory=into[:num_bytes], num_words=num_words, num_listed=len(places))
    *_, of_places, of_words = packed.parts(packed.memory)
    of_places.copy_(places)
    of_words.copy_(words[places])
    return packed


def packed_bytes(num_words: int, num_listed: int) -> int:
    """Bytes of so many words, of which so many are listed."""
    return sum(map(_aligned, _sizes(num_words, num_listed)))


def _pack_piece(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bytes, codes and bases of at most `_PIECE` words, and the places of those to be listed."""
    count = words.numel()
    wide = words.to(torch.int32)
    low = ((wide >> 8) & 128 | wide & 127).to(torch.uint8)
    exponents = ((wide >> 7) & 255).to(torch.uint8)
    padded = exponents.new_zeros(-(-count // CHUNK) * CHUNK)
    padded[:count] = exponents
    chunks = padded.view(-1, CHUNK)
    bases = (chunks.amax(1).to(torch.int16) - (_CODES - 1)).clamp_min(0)
    found = chunks.to(torch.int16) - bases[:, None]
    is_listed = found < 0  # above the base are 15 exponents, and no larger one is in the chunk
    halves = torch.where(is_listed, _CODES, found).view(-1, 2, _HALF).to(torch.uint8)
    codes = (halves[:, 0] | halves[:, 1] << 4).flatten()
    places = is_listed.flatten()[:count].nonzero()[:, 0]
    return low, codes, bases.to(torch.uint8), places


def _sizes(num_words: int, num_listed: int) -> tuple[int, int, int, int, int]:
    """Bytes of the stretches."""
    num_chunks = -(-num_words // CHUNK)
    return num_words, num_chunks * _HALF, num_chunks, 4 * num_listed, 2 * num_listed


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


# 2. Reference


def unpack_reference(packed: Packed, memory: Tensor, out: Tensor) -> None:
    """`unpack` in plain torch."""
    low, codes, bases, places, words = packed.parts(memory)
    both = torch.stack([codes.view(-1, _HALF) & 15, codes.view(-1, _HALF) >> 4], 1).view(-1, CHUNK)
    exponents = (both.to(torch.int32) + bases[:, None]).flatten()[: packed.num_words]
    wide = low.to(torch.int32)
    out.copy_((wide & 128) << 8 | exponents << 7 | wide & 127)  # keeps the lower 16 bits
    out[places.long()] = words


# 3. Triton

if triton_is_installed():

    @triton.jit
    def _unpack_half(low_ptr, out_ptr, codes, base, count, HALF: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
        column = tl.arange(0, HALF)
        if MASKED:
            low = tl.load(low_ptr + column, mask=column < count, other=0).to(tl.int32)
        else:
            low = tl.load(low_ptr + column).to(tl.int32)
        word = (((low & 128) << 8) | ((base + codes) << 7) | (low & 127)).to(tl.int16)
        if MASKED:
            tl.store(out_ptr + column, word, mask=column < count)
        else:
            tl.store(out_ptr + column, word)

    @triton.jit(do_not_specialize=["num_words"])
    def _unpack_kernel(  # type: ignore[no-untyped-def]
        low_ptr, codes_ptr, bases_ptr, out_ptr, num_words, HALF: tl.constexpr
    ):
        chunk = tl.program_id(0).to(tl.int64)
        base = tl.load(bases_ptr + chunk).to(tl.int32)
        codes = tl.load(codes_ptr + chunk * HALF + tl.arange(0, HALF)).to(tl.int32)
        first = chunk * 2 * HALF
        second = first + HALF
        if second + HALF <= num_words:  # without masks, several words are loaded and stored at a time
            _unpack_half(low_ptr + first, out_ptr + first, codes & 15, base, 0, HALF, False)
            _unpack_half(low_ptr + second, out_ptr + second, codes >> 4, base, 0, HALF, False)
        else:
            _unpack_half(low_ptr + first, out_ptr + first, codes & 15, base, num_words - first, HALF, True)
            _unpack_half(low_ptr + second, out_ptr + second, codes >> 4, base, num_words - second, HALF, True)

    @triton.jit(do_not_specialize=["num_listed"])
    def _list_kernel(  # type: ignore[no-untyped-def]
        places_ptr, words_ptr, out_ptr, num_listed, COUNT: tl.constexpr
    ):
        at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
        inside = at < num_listed
        place = tl.load(places_ptr + at, mask=inside, other=0).to(tl.int64)
        tl.store(out_ptr + place, tl.load(words_ptr + at, mask=inside, other=0), mask=inside)

    _run_unpack = Launcher(_unpack_kernel)
    _run_list = Launcher(_list_kernel)


def _launch(packed: Packed, memory: Tensor, out: Tensor) -> None:
    low, codes, bases, places, words = packed.parts(memory)
    _run_unpack((bases.numel(), 1, 1), (low, codes, bases, out), (packed.num_words,), (_HALF,), 4)
    if packed.num_listed:
        programs = -(-packed.num_listed // _LISTED)
        _run_list((programs, 1, 1), (places, words, out), (packed.num_listed,), (_LISTED,), 4)


# 4. Public


@torch.no_grad()
def unpack(packed: Packed, memory: Tensor, out: Tensor) -> None:
    """Write the words into `out`, int16 [n] on the device of `memory`, a copy of `packed.memory`."""
    if not packed.num_words:
        return
    if backend(memory.device).name == "triton":
        _launch(packed, memory, out)
    else:
        unpack_reference(packed, memory, out)
