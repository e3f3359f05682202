"""Every known format into every target: exact, or refused for a reason; and the way back, byte by byte."""

from pathlib import Path

import lora_samples as s
import pytest
from lora_samples import samples
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.read import parse_lora, read_lora
from diffusers_qwenimage.lora.render import Options
from diffusers_qwenimage.lora.targets import TARGETS
from diffusers_qwenimage.lora.verify import compare_files

METADATA = {"format": "pt", "ss_tag_frequency": '{"a": 1}', "sshs_model_hash": "0123", "title": "Größe"}
# The targets that hold a kind of file. What is missing here has to be refused.
HELD = {
    s.LORA: set(TARGETS),
    s.DORA: {"diffusers", "peft", "kohya"},
    s.DORA_INPUT: {"kohya"},
    s.LOKR_WHOLE: {"comfyui", "kohya"},
    s.LOW_RANK: set(TARGETS),
    s.DIFFERENCE: {"comfyui"},
    s.NEEDS_BASE: set(),
    s.EMBEDDING: {"peft", "diffusers"},
    s.OTHER_MODEL: set(),
}
REASONS = {
    s.DORA: ("DoRA",),
    s.DORA_INPUT: ("per input column", "DoRA"),
    s.LOKR_WHOLE: ("full rank 64",),
    s.DIFFERENCE: ("no exact low-rank form", "no LoRA form"),
    s.NEEDS_BASE: ("relative to the base weights",),
    s.EMBEDDING: ("LoRA of an embedding",),
    s.OTHER_MODEL: ("Qwen-Image 2.1",),
}


def held(name: str, target: str) -> bool:
    if name in s.WITH_TEXT_ENCODER:
        return target in ("comfyui", "kohya")
    return target in HELD[s.sample_kind(name)]


def output_path(folder: Path, target: str) -> Path:
    return folder / ("out" if target == "peft" else "out.safetensors")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", samples())
def test_exact_or_refused(name: str, target: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", output_path(tmp_path, target)
    save_file(samples()[name].tensors(), source, metadata=METADATA)
    if not held(name, target):
        with pytest.raises(ValueError) as error:
            convert_lora(source, output, target)
        reasons = ("text encoder",) if name in s.WITH_TEXT_ENCODER else REASONS[s.sample_kind(name)]
        assert any(reason in str(error.value) for reason in reasons), error.value
        assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
        return
    conversion = convert_lora(source, output, target)
    assert conversion.comparison.exact and conversion.comparison.bound == 0
    assert conversion.comparison.num_exact == len(conversion.comparison.modules) > 0
    written = read_lora(output)
    assert compare_files(read_lora(source), written).exact
    assert written.metadata["title"] == "Größe" and "sshs_model_hash" not in written.metadata
    if s.sample_kind(name) == s.LOW_RANK and target not in ("comfyui", "kohya"):
        return  # expanded: the factors of the source are not in the output
    back = convert_lora(output, tmp_path / "back.safetensors", "original")
    assert back.restored and back.comparison.exact
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", s.WITH_TEXT_ENCODER)
def test_the_text_encoder_is_dropped_only_on_request(name: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(samples()[name].tensors(), source)
    conversion = convert_lora(source, output, "opensource", options=Options(drop_text_encoder=True))
    assert "1 updates of the text encoder were dropped, as asked" in conversion.notes
    assert not any(update.component == "text_encoder" for update in read_lora(output).updates)


@pytest.mark.parametrize("name", [n for n in samples() if s.sample_kind(n) == s.LORA])
def test_strict_gives_the_same_bits_or_refuses(name: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    tensors = samples()[name].tensors(alpha=2.0)
    save_file(tensors, source)
    scaled = any(key.endswith(".alpha") for key in tensors)
    strict = Options(strict=True)
    if scaled or name == "fused_qkv_for_nunchaku_runtime":
        with pytest.raises(ValueError, match="--strict|text encoder"):
            convert_lora(source, output, "diffsynth", options=strict)
        return
    assert convert_lora(source, output, "diffsynth", options=strict).comparison.same_bits


@pytest.mark.parametrize(
    "name", ["musubi_lora", "lora_transformer_flat", "diffsynth_train_no_prefix_removal"]
)
def test_the_portable_file_is_that_of_lightning(name: str, tmp_path: Path) -> None:
    save_file(samples()[name].tensors(alpha=4.0), tmp_path / "source.safetensors")
    convert_lora(tmp_path / "source.safetensors", tmp_path / "out.safetensors", "portable")
    keys = load_file(tmp_path / "out.safetensors").keys()
    lightning = samples()["qwen_image_lightning"].keys
    assert set(keys) <= set(lightning) and len(keys) == 3 * len(
        read_lora(tmp_path / "out.safetensors").updates
    )


def test_approximation_states_its_error(tmp_path: Path) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(samples()["lycoris_lokr_full"].tensors(), source)
    conversion = convert_lora(
        source, output, "diffsynth", options=Options(allow_approximate=True, max_rank=16)
    )
    assert 0.1 < conversion.comparison.bound < 1
    full = convert_lora(source, output, "diffsynth", options=Options(allow_approximate=True))
    assert full.comparison.bound < 1e-6  # rank 64 of 64: what is left is the rounding of the fp32 factors
    assert parse_lora(output).problems == ()
