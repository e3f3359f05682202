"""Round trips over formats, ranks, alphas, types and missing modules: the change of the weights never
changes."""

import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from diffusers_qwenimage.lora import formats
from diffusers_qwenimage.lora.convert import convert_lora, convert_state_dict
from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.formats import Format
from diffusers_qwenimage.lora.read import read_lora, read_state_dict
from diffusers_qwenimage.lora.render import Options, render
from diffusers_qwenimage.lora.targets import TARGETS
from diffusers_qwenimage.lora.verify import compare_files

HIDDEN = 8
MODULES = {
    "attn.to_q": (8, 8),
    "attn.to_k": (8, 8),
    "attn.to_v": (8, 8),
    "attn.add_k_proj": (8, 8),
    "img_mlp.net.0.proj": (32, 8),
    "txt_mlp.net.2": (8, 32),
    "img_mod.1": (48, 8),
}
WITH_ALPHA = (
    formats.OPENSOURCE,
    formats.KOHYA_FLAT,
    formats.COMFYUI,
    formats.LYCORIS,
    formats.DIFFSYNTH_BARE,
)
WITHOUT_ALPHA = (formats.DIFFSYNTH, formats.DIFFUSERS, formats.DIFFUSERS_OLD_KEYS, formats.PEFT_DIRECTORY)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file as a writer would write it, and the changes that it means, computed without the library."""

    format: Format
    tensors: dict[str, Tensor]
    deltas: dict[str, Tensor]
    scales: dict[str, Fraction]


@st.composite
def written_files(draw: st.DrawFn) -> Written:
    format_ = draw(st.sampled_from(WITH_ALPHA + WITHOUT_ALPHA))
    dtype = draw(st.sampled_from(DTYPES))
    blocks = draw(st.lists(st.integers(0, 99), min_size=1, max_size=2, unique=True))
    names = draw(st.lists(st.sampled_from(sorted(MODULES)), min_size=1, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = draw(st.sampled_from([1.0, 1e-4]))
    tensors, deltas, scales = {}, {}, {}
    for module in (f"transformer_blocks.{block}.{name}" for block in blocks for name in names):
        out, width = MODULES[module.split(".", 2)[2]]
        rank = draw(st.integers(1, 5))
        down = torch.randn(rank, width, generator=generator).to(dtype)
        up = (torch.randn(out, rank, generator=generator) * magnitude).to(dtype)
        alpha = float(rank)
        if format_ in WITH_ALPHA:
            alpha = draw(st.sampled_from([float(rank), 1.0, 2.0, 0.5, 16.0, 3.0, 0.1, -1.0]))
            stored_alpha = torch.tensor(alpha, dtype=draw(st.sampled_from([torch.float32, dtype])))
            tensors[format_.render(module, "alpha")] = stored_alpha
            alpha = float(stored_alpha)
        tensors[format_.render(module, "down")] = down
        tensors[format_.render(module, "up")] = up
        scales[module] = Fraction(alpha) / rank
        deltas[module] = up.double() @ down.double() * float(scales[module])
    return Written(format=format_, tensors=tensors, deltas=deltas, scales=scales)


@settings(max_examples=60, deadline=None)
@given(written_files(), st.sampled_from(sorted(TARGETS)))
def test_a_conversion_is_exact_or_refused_for_its_scale(file: Written, target: str) -> None:
    try:
        rendered = render(read_state_dict(file.tensors), TARGETS[target])
    except ValueError as error:
        assert "scale" in str(error)
        assert target in ("opensource", "kohya", "comfyui") or not TARGETS[target].holds_alpha
        assert any(scale != 1 for scale in file.scales.values())
        return
    tensors = {tensor.key: tensor.load() for tensor in rendered.tensors}
    read = read_state_dict(tensors, metadata=rendered.metadata, adapter_config=rendered.adapter_config)
    assert compare_files(read_state_dict(file.tensors), read).exact
    if target == "nunchaku":
        return  # q, k and v are joined; compare_files has taken them apart again
    changes = {update.module: delta_weight(update) for update in read.updates}
    assert changes.keys() == file.deltas.keys()
    for module, change in changes.items():
        # fp64 products of the same numbers in another order
        torch.testing.assert_close(change, file.deltas[module], rtol=1e-13, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(written_files(), st.lists(st.sampled_from(sorted(set(TARGETS) - {"peft"})), min_size=1, max_size=3))
def test_the_way_back_over_several_conversions_gives_the_same_bytes(file: Written, path: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        save_file(file.tensors, source, metadata={"format": "pt", "step": "7"})
        history = [source]
        for target in path:
            output = Path(folder) / str(len(list(Path(folder).iterdir())))
            try:
                conversion = convert_lora(history[-1], output, target)
            except ValueError as error:
                assert "scale" in str(error)
                break
            assert compare_files(read_lora(source), read_lora(output)).exact
            if conversion.restored:  # a format that it already had: one of the files before, again
                earlier = [past for past in history if past.read_bytes() == output.read_bytes()]
                history = history[: history.index(earlier[-1]) + 1]
            else:
                history.append(output)
        current = history.pop()
        while history:
            expected = history.pop()
            back = Path(folder) / f"back{len(history)}"
            assert convert_lora(current, back, "original").restored
            assert back.read_bytes() == expected.read_bytes()
            current = back


@settings(max_examples=40, deadline=None)
@given(written_files(), st.sampled_from(["diffsynth", "opensource", "nunchaku"]))
def test_an_approximation_is_as_good_as_fp32(file: Written, target: str) -> None:
    tensors, metadata = convert_state_dict(file.tensors, target, options=Options(allow_approximate=True))
    read = read_state_dict(tensors, metadata=metadata)
    # A scale rounded to fp32, or one factor: each at most 2^-24 relative per number.
    assert compare_files(read_state_dict(file.tensors), read).bound < 2**-22


@settings(max_examples=25, deadline=None)
@given(written_files(), st.data())
def test_a_missing_tensor_is_noticed(file: Written, data: st.DataObject) -> None:
    factors = [key for key in file.tensors if not key.endswith(".alpha")]
    gone = data.draw(st.sampled_from(factors))
    left = {key: tensor for key, tensor in file.tensors.items() if key != gone}
    try:
        read_state_dict(left)
    except ValueError as error:
        assert "no partner" in str(error)
        return
    raise AssertionError(f"{gone} was not missed")
