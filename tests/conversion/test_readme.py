"""The tables of conversion/README.md are those of the code, and say what the code does."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "conversion"
sys.path.insert(0, str(FOLDER))

import format_table  # noqa: E402
import lora_samples as s  # noqa: E402

from diffusers_qwenimage.lora import convert_state_dict  # noqa: E402
from diffusers_qwenimage.lora.targets import TARGETS  # noqa: E402

SAMPLE = {
    "LoRA, alpha equal to the rank": ("musubi_lora", 4.0),
    "LoRA, another alpha": ("musubi_lora", 2.0),
    "DoRA, magnitude per output row": ("lycoris_locon_dora", 2.0),
    "DoRA, magnitude per input column": ("onetrainer_original_dora_input_axis", 2.0),
    "LoKr with a decomposed factor": ("musubi_lokr_lowrank", 2.0),
    "LoKr with two whole factors": ("musubi_lokr_full", 2.0),
    "LoHa": ("musubi_loha", 2.0),
    "difference of a bias or a norm": ("lycoris_norm", 2.0),
    "LoRA of an embedding (Layered)": ("layered_embedding_extra", 2.0),
    "GLoRA, OFT, IA3": ("lycoris_oft", 2.0),
}


def test_the_tables_are_current() -> None:
    text = format_table.README.read_text(encoding="utf-8")
    assert format_table.updated(text) == text, "run `python conversion/format_table.py`"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", SAMPLE)
def test_the_table_of_kinds_says_what_happens(row: str, target: str) -> None:
    kind, reason = next((kind, reason) for name, kind, reason in format_table.KINDS if name == row)
    name, alpha = SAMPLE[row]
    tensors = s.samples()[name].tensors(alpha=alpha)
    if format_table._cell(TARGETS[target], kind, reason) == "refused":
        with pytest.raises(ValueError, match="cannot become"):
            convert_state_dict(tensors, target)
    else:
        assert convert_state_dict(tensors, target)[0]


def test_every_script_is_listed() -> None:
    text = format_table.README.read_text(encoding="utf-8")
    for script in FOLDER.glob("*.py"):
        assert f"| `{script.name}" in text, script.name
