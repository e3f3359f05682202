"""Any combination of known and unknown keys, shapes and types: understood or refused, never a crash."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_qwenimage.lora.formats import FORMATS, SHARED_SUFFIXES, SPELLINGS
from diffusers_qwenimage.lora.read import listing, parse_tensors
from diffusers_qwenimage.lora.render import Options, render
from diffusers_qwenimage.lora.report import report, report_lines
from diffusers_qwenimage.lora.targets import TARGETS
from diffusers_qwenimage.lora.updates import stored
from diffusers_qwenimage.lora.verify import compare_files

MODULES = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_qkv",
    "transformer_blocks.3.attn.norm_q",
    "time_text_embed.addition_t_embedding",
    "model.layers.0.self_attn.q_proj",
    "txt_in.in_layer",
    "nonsense",
)
SUFFIXES = (
    *(suffix.replace("{adapter}", "default") for s in SPELLINGS for suffix in s.suffixes.values()),
    *SHARED_SUFFIXES,
    "bias",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.float64)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 12]), max_size=4)


# Modules, and roles and shapes that belong together.
Q, QKV, NORM, EMBEDDING, TEXT = MODULES[:5]
COMPLETE: tuple[tuple[str, dict[str, tuple[int, ...]]], ...] = (
    (Q, {"down": (2, 4), "up": (4, 2)}),
    (Q, {"down": (2, 4), "up": (4, 2), "up_bias": (4,)}),
    (QKV, {"down": (2, 4), "up": (12, 2)}),
    (QKV, {"down": (3, 4), "up": (12, 3), "alpha": ()}),
    (Q, {"down": (2, 4), "up": (4, 2), "alpha": (), "magnitude": (4,)}),
    (Q, {"down": (2, 4), "up": (4, 2), "alpha": (1,), "magnitude": (1, 4)}),
    (Q, {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2), "alpha": ()}),
    (Q, {"lokr_w1": (2, 2), "lokr_w2": (2, 2), "alpha": ()}),
    (QKV, {"lokr_w1": (6, 2), "lokr_w2": (2, 2)}),
    (Q, {"hada_w1_a": (4, 1), "hada_w1_b": (1, 4), "hada_w2_a": (4, 1), "hada_w2_b": (1, 4)}),
    (Q, {"diff": (4, 4), "diff_b": (4,)}),
    (NORM, {"diff": (4,)}),
    (EMBEDDING, {"embedding_down": (2, 2), "embedding_up": (4, 2)}),
    (TEXT, {"down": (2, 4), "up": (4, 2), "alpha": ()}),
)


@st.composite
def complete_modules(draw: st.DrawFn) -> dict[str, Tensor]:
    """One module as its format would write it."""
    module, roles = draw(st.sampled_from(COMPLETE))
    component = "text_encoder" if module == TEXT else "transformer"
    format_ = draw(st.sampled_from([f for f in FORMATS if f.component == component]))
    dtype = draw(st.sampled_from(DTYPES[:3]))
    value = draw(st.sampled_from([1.0, 0.3, -2.0]))
    known = {*SHARED_SUFFIXES.values(), *format_.spelling.suffixes}
    return {
        format_.render(module, role): torch.full(shape, value).to(dtype)
        for role, shape in roles.items()
        if role in known
    }


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module in draw(st.lists(complete_modules(), max_size=2)):
        tensors |= module
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        format_ = draw(st.sampled_from(FORMATS))
        module = draw(st.sampled_from(MODULES))
        stem = module.replace(".", "_") if format_.flat else module
        value = torch.full(draw(SHAPES), draw(st.sampled_from([0.0, 1.0])))
        key = f"{format_.prefix}{stem}.{draw(st.sampled_from(SUFFIXES))}"
        tensors[key] = value.to(draw(st.sampled_from(DTYPES)))
    return tensors


@settings(max_examples=300, deadline=None)
@given(state_dicts(), st.sampled_from(sorted(TARGETS)), st.booleans())
def test_understood_or_refused(tensors: dict[str, Tensor], target: str, approximate: bool) -> None:
    file = parse_tensors({key: stored(key, tensor) for key, tensor in tensors.items()}, name="fuzz")
    assert report_lines(report(file))
    used = {tensor.key for update in file.updates for tensor in update.tensors.values()}
    assert file.problems or used == set(tensors)
    if file.problems:
        assert len(listing(file.problems)) > 0
        return
    try:
        rendered = render(file, TARGETS[target], Options(allow_approximate=approximate, max_rank=2))
    except ValueError as error:
        assert len(str(error)) > 20
        return
    written = parse_tensors(
        {tensor.key: stored(tensor.key, tensor.load()) for tensor in rendered.tensors},
        name="written",
        metadata=rendered.metadata,
        adapter_config=rendered.adapter_config,
    )
    assert written.problems == ()
    assert approximate or compare_files(file, written).exact


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_as_a_key(key: str) -> None:
    assert parse_tensors({key: stored(key, torch.ones(2, 2))}, name="fuzz").problems
