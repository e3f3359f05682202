"""Files that we write, loaded by diffusers and by PEFT: the weights change as we say they do."""

import warnings
from pathlib import Path

import lora_samples as s
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from lora_samples import samples
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.factors import delta_weight
from diffusers_qwenimage.lora.fused import split_all
from diffusers_qwenimage.lora.read import read_lora

# The targets that diffusers 0.42.1 reads.
DIFFUSERS_TARGETS = ("opensource", "diffsynth", "diffusers", "comfyui", "kohya")
PLAIN = [n for n in samples() if s.sample_kind(n) in (s.LORA, s.LOW_RANK) and n not in s.WITH_TEXT_ENCODER]
DORA = [n for n in samples() if s.sample_kind(n) == s.DORA]
# The factors are multiplied in fp32 by PEFT and in fp64 by us, and diffusers folds the alpha in the type of
# the file, exactly for the alphas used here. 64 products of numbers around 0.1: errors of a few 1e-8 at most.
TOLERANCE = 1e-6


@pytest.fixture
def model() -> QwenImageTransformer2DModel:
    """A transformer with the sizes of the samples."""
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=48,
        in_channels=64,
        out_channels=16,
        axes_dims_rope=(4, 6, 6),
    )


def write_source(name: str, path: Path, *, alpha: float = 2.0) -> None:
    save_file(samples()[name].tensors(alpha=alpha), path, metadata={"format": "pt"})


def expected_changes(path: Path) -> dict[str, Tensor]:
    file = read_lora(path)
    return {u.module: delta_weight(u) for u in split_all(file.updates, file.architecture)}


def loaded_changes(model: torch.nn.Module) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(next(iter(module.lora_A))).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and len(module.lora_A)
    }


def load_into(model: QwenImageTransformer2DModel, path: Path) -> None:
    """What `pipe.load_lora_weights` does, without the rest of a pipeline."""
    state_dict, metadata = QwenImageLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert all("lora" in key for key in state_dict)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(
        state_dict, transformer=model, adapter_name="test", metadata=metadata
    )


def assert_same(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(loaded[name].double(), change, rtol=TOLERANCE, atol=TOLERANCE)


# ComfyUI keeps LoKr and LoHa as they are, which diffusers does not read.
@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in PLAIN
        for target in DIFFUSERS_TARGETS
        if target != "comfyui" or s.sample_kind(name) != s.LOW_RANK
    ],
)
def test_against_diffusers(
    name: str, target: str, tmp_path: Path, model: QwenImageTransformer2DModel
) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    write_source(name, source)
    convert_lora(source, output, target)
    if target == "kohya" and s.sample_kind(name) == s.LOW_RANK:
        with pytest.raises(ValueError, match="should be empty"):  # no silent half: diffusers refuses it
            load_into(model, output)
        return
    load_into(model, output)
    assert_same(loaded_changes(model), expected_changes(source))


@pytest.mark.parametrize("name", DORA)
def test_dora_against_diffusers(name: str, tmp_path: Path, model: QwenImageTransformer2DModel) -> None:
    """The merged weight of a DoRA depends on the base weight, so it is compared as a whole."""
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    write_source(name, source)
    convert_lora(source, output, "diffusers")
    bases = {name: p.detach().double() for name, p in model.named_parameters() if name.endswith(".weight")}
    load_into(model, output)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_A)}
    updates = {update.module: update for update in read_lora(source).updates}
    assert layers.keys() == updates.keys()
    for module, update in updates.items():
        changed = bases[f"{module}.weight"] + delta_weight(update)
        expected = (
            update.load("magnitude").double().reshape(-1, 1) * changed / changed.norm(dim=1, keepdim=True)
        )
        layers[module].merge()
        merged = layers[module].get_base_layer().weight.detach().double()
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)  # fp32 norms and division


def test_a_lora_of_an_embedding_against_diffusers(tmp_path: Path, model: QwenImageTransformer2DModel) -> None:
    """The metadata names the module; without it diffusers finds no rank in such a file."""
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    model.time_text_embed.addition_t_embedding = torch.nn.Embedding(2, 64)
    write_source("layered_embedding_extra", source)
    convert_lora(source, output, "diffusers")
    load_into(model, output)
    layer = model.time_text_embed.addition_t_embedding
    assert_same(
        {"time_text_embed.addition_t_embedding": layer.get_delta_weight("test").detach()},
        expected_changes(source),
    )


def test_rank_stabilised_and_mixed_ranks_against_diffusers(
    tmp_path: Path, model: QwenImageTransformer2DModel
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for rank, module in ((3, "attn.to_q"), (5, "attn.to_k"), (3, "img_mlp.net.0.proj")):
        out, width = (256, 64) if "mlp" in module else (64, 64)
        stem = f"transformer_blocks.0.{module}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank * 2) if rank == 3 else 7.0)
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    convert_lora(source, output, "diffusers")
    load_into(model, output)
    loaded, expected = loaded_changes(model), expected_changes(source)
    for name, change in expected.items():
        # entries up to 20: fp32 products of standard normal numbers
        torch.testing.assert_close(loaded[name].double(), change, rtol=1e-5, atol=1e-5)


def test_bare_files_without_alpha_are_ignored_by_diffusers(
    tmp_path: Path, model: QwenImageTransformer2DModel
) -> None:
    """Why `opensource` is not what DiffSynth-Studio once called so."""
    source, output = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    write_source("musubi_lora", source)
    conversion = convert_lora(source, output, "diffsynth-bare")
    assert any("diffusers ignores this spelling" in note for note in conversion.notes)
    load_into(model, output)
    assert loaded_changes(model) == {}


@pytest.mark.parametrize("name", [*PLAIN, *DORA, "layered_embedding_extra"])
def test_against_peft(name: str, tmp_path: Path, model: QwenImageTransformer2DModel) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "adapter"
    if name == "layered_embedding_extra":
        model.time_text_embed.addition_t_embedding = torch.nn.Embedding(2, 64)
    write_source(name, source)
    convert_lora(source, output, "peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(model, str(output))
    expected = expected_changes(source)
    if name == "layered_embedding_extra":
        layer = loaded.base_model.model.time_text_embed.addition_t_embedding
        changes = {"time_text_embed.addition_t_embedding": layer.get_delta_weight("default").detach()}
    else:
        changes = loaded_changes(loaded)
    assert_same(changes, expected)


def test_what_diffusers_saves_is_read_with_its_scale(
    tmp_path: Path, model: QwenImageTransformer2DModel
) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "img_mod.1"],
        rank_pattern={"to_k": 9},
        alpha_pattern={"to_k": 5},
        use_rslora=True,
        init_lora_weights=False,
    )
    model.add_adapter(config)
    expected = loaded_changes(model)
    QwenImageLoraLoaderMixin.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    file = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert {update.scale.source for update in file.updates} == {"metadata"}
    assert all(update.scale.rslora for update in file.updates)
    assert_same(expected, {update.module: delta_weight(update) for update in file.updates})
    convert_lora(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "peft", "peft")
    again = read_lora(tmp_path / "peft")
    assert_same(expected, {update.module: delta_weight(update) for update in again.updates})


# PEFT warns that a bias has one dimension.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_what_peft_saves_is_read_with_its_scale(tmp_path: Path, model: QwenImageTransformer2DModel) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["to_v", "proj_out"], init_lora_weights=False, lora_bias=True
    )
    peft_model = get_peft_model(model, config)
    expected = loaded_changes(peft_model)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    file = read_lora(tmp_path / "adapter")
    assert {(u.scale.source, u.scale.value) for u in file.updates} == {("adapter_config", 4.0)}
    assert all("up_bias" in update.tensors for update in file.updates)
    assert_same(expected, {update.module: delta_weight(update) for update in file.updates})
