"""The sample files of every known writer (`conversion/key_samples`), filled with random numbers."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "conversion" / "key_samples"
LORA, DORA, DORA_INPUT, LOKR_WHOLE, LOW_RANK, DIFFERENCE, NEEDS_BASE, EMBEDDING, OTHER_MODEL = range(9)
_KINDS = {
    DORA: ("diffusers_dora", "peft_adapter_dir_dora", "ai_toolkit_dora", "lycoris_locon_dora")
    + ("onetrainer_diffusers_dora_output_axis", "onetrainer_legacy_dora_output_axis"),
    DORA_INPUT: ("onetrainer_original_dora_input_axis",),
    LOKR_WHOLE: ("ai_toolkit_lokr_full", "ai_toolkit_lokr_old_format", "diffusion_pipe_lokr_peft")
    + ("simpletuner_lycoris_lokr", "musubi_lokr_full", "lycoris_lokr_full"),
    LOW_RANK: ("ai_toolkit_lokr_factored", "musubi_loha", "musubi_lokr_lowrank", "lycoris_loha")
    + ("lycoris_lokr_lowrank_decompose_both",),
    DIFFERENCE: ("ai_toolkit_full_diff", "lycoris_full_diff", "lycoris_norm", "lightx2v_extractor"),
    NEEDS_BASE: ("lycoris_glora", "lycoris_oft", "lycoris_ia3"),
    EMBEDDING: ("layered_embedding_extra",),
    OTHER_MODEL: ("qwen_image_21_diffusers", "qwen_image_21_kohya"),
}
KIND = {name: kind for kind, names in _KINDS.items() for name in names}
WITH_TEXT_ENCODER = ("onetrainer_kohya", "onetrainer_comfy", "onetrainer_legacy")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The keys and shapes that a writer gives a model with one block, hidden width 64 and rank 4."""

    name: str
    note: str
    keys: dict[str, tuple[int, ...]]

    def tensors(
        self, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, alpha: float = 2.0
    ) -> dict[str, Tensor]:
        """Random factors, and `alpha` for every alpha key."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for key, shape in self.keys.items():
            if key.endswith(".on_input"):
                tensors[key] = torch.tensor(True)
            elif key.endswith(".alpha"):
                tensors[key] = torch.full(shape, alpha)
            else:
                scale = 1 / math.sqrt(shape[-1])
                tensors[key] = (torch.randn(shape, generator=generator) * scale).to(dtype)
        return tensors


@cache
def samples() -> dict[str, Sample]:
    """All samples by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        keys = {key: tuple(shape) for key, shape in data["keys"].items()}
        found[path.stem] = Sample(name=data["format"], note=data["note"], keys=keys)
    return found


def sample_kind(name: str) -> int:
    """What the sample holds; LORA unless it is listed above."""
    return KIND.get(name, LORA)
