"""Quantised models in files: folders, single files as ComfyUI's, checkpoints made tensor by tensor."""

import json

import diffusers
import pytest
import torch
from components import TRANSFORMER, transformer_inputs, transformers
from fused_cases import relative
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module, load_transformer_file, read_component
from diffusers_qwenimage.files import read_header, write_safetensors_in_turn
from diffusers_qwenimage.kernels.rows import hadamard
from diffusers_qwenimage.offload import adopt
from diffusers_qwenimage.quantize import (
    KINDS,
    SKIPPED,
    QuantizedLinear,
    quantize_,
    quantize_checkpoint,
    write_single_file,
)

LAYER = "transformer_blocks.0.attn.to_q"
# Weights at other addresses are summed in another order, and then a code may fall beyond a border
# (a step of fp8 is 6 %; see test_quantize.py).
ROUNDING = 2e-3


def quantized(kind, **options):
    ours, _ = transformers()
    quantize_(ours, kind, **options)
    return ours.requires_grad_(False)


def output(model):
    with torch.no_grad():
        return model(**transformer_inputs([(1, 4, 6)])).sample


def same_tensors(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_folders(kind, tmp_path):
    ours = quantized(kind, skip=(*SKIPPED, "txt_mlp"))
    ours.save_pretrained(tmp_path / "first", max_shard_size="60KB")
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "first")
    same_tensors(loaded, ours)
    assert relative(output(loaded), output(ours)) < ROUNDING
    loaded.save_pretrained(tmp_path / "second")
    same_tensors(QwenImageTransformer2DModel.from_pretrained(tmp_path / "second"), ours)
    half = QwenImageTransformer2DModel.from_pretrained(tmp_path / "second", torch_dtype=torch.bfloat16)
    layer = half.get_submodule(LAYER)
    assert layer.bias.dtype == torch.bfloat16 == layer.compute_dtype and half.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, ours.get_submodule(LAYER).weight_scale)


def test_folders_of_plain_models_stay_those_of_diffusers(tmp_path):
    ours, _ = transformers()
    ours.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path)


def test_diffusers_alone_refuses_what_it_cannot_read(tmp_path):
    quantized("fp8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "somebody-elses"  # ours is known here by now
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Unknown quantization type"):
        diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path)


def test_a_record_that_does_not_fit_is_refused(tmp_path):
    quantized("fp8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["fp8"].append("transformer_blocks.7.attn.to_q")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no linear layer 'transformer_blocks.7.attn.to_q'"):
        QwenImageTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_single_files(kind, tmp_path):
    ours, file = quantized(kind), tmp_path / "model.safetensors"
    write_single_file(ours, file)
    options = {"config": dict(ours.config), "dtype": torch.float32}
    loaded = QwenImageTransformer2DModel.from_single_file(file, weights=kind, **options)
    assert relative(output(loaded), output(ours)) < ROUNDING
    assert isinstance(loaded.get_submodule(LAYER), QuantizedLinear)
    assert not isinstance(loaded.transformer_blocks[0].img_mod[1], QuantizedLinear)  # as in the file
    plain = QwenImageTransformer2DModel.from_single_file(file, **options)
    assert relative(output(plain), output(ours)) < 0.02
    assert torch.equal(
        plain.get_submodule(LAYER).weight, loaded.get_submodule(LAYER).dequantized(torch.float32)
    )


def test_single_files_are_comfyuis(tmp_path):
    for kind, settings in (
        ("fp8", {"format": "float8_e4m3fn"}),
        ("int8", {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 16}),
    ):
        ours = quantized(kind)
        write_single_file(ours, tmp_path / "x.safetensors")
        tensors = load_file(tmp_path / "x.safetensors")
        assert json.loads(bytes(tensors[f"{LAYER}.comfy_quant"].tolist())) == settings
        weight, scale = tensors[f"{LAYER}.weight"].float(), tensors[f"{LAYER}.weight_scale"]
        assert scale.shape == (() if kind == "fp8" else (48, 1)) and scale.dtype == torch.float32
        restored = weight * scale
        if kind == "int8":  # as ComfyUI rotates back
            restored = (restored.view(48, 3, 16) @ hadamard(16, torch.device("cpu"))).view(48, 48)
        assert relative(restored, ours.get_submodule(LAYER).dequantized(torch.float32)) < 1e-6


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_comfyuis_scaled_files_are_taken_without_being_multiplied_out(suffix, tmp_path):
    ours, _ = transformers()
    tensors, layers = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, []
    for name, value in ours.state_dict().items():
        tensors[name] = value
        if value.ndim == 2 and ("img_mod" in name or ".attn." in name):  # also layers that we would skip
            scale = value.abs().amax() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", suffix)] = scale
            layers.append(name.removesuffix(".weight"))
    save_file(
        {f"model.diffusion_model.{name}": value for name, value in tensors.items()},
        tmp_path / "x.safetensors",
    )
    options = {"config": dict(ours.config), "dtype": torch.float32}
    exact = output(load_transformer_file(QwenImageTransformer2DModel, tmp_path / "x.safetensors", **options))
    for kind in ("fp8", "fp8-storage"):
        loaded = QwenImageTransformer2DModel.from_single_file(
            tmp_path / "x.safetensors", weights=kind, **options
        )
        found = {name for name, part in loaded.named_modules() if isinstance(part, QuantizedLinear)}
        assert found == set(layers)
        assert torch.equal(loaded.get_submodule(LAYER).weight.float(), tensors[f"{LAYER}.weight"].float())
        assert relative(output(loaded), exact) < (ROUNDING if kind == "fp8-storage" else 0.01)
    anew = QwenImageTransformer2DModel.from_single_file(tmp_path / "x.safetensors", weights="int8", **options)
    assert anew.get_submodule(LAYER).kind == "int8" and relative(output(anew), exact) < 0.01


def test_other_files_are_quantised_as_they_are_loaded(tmp_path):
    ours, _ = transformers()
    ours.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = QwenImageTransformer2DModel.from_single_file(
        file, weights="int8", dtype=torch.float32, skip=["mod"]
    )
    same_tensors(loaded, quantized("int8", skip=["mod"]))
    from_tensors = QwenImageTransformer2DModel.from_single_file(
        ours.state_dict(), weights="int8", dtype=torch.float32, config=dict(ours.config)
    )
    same_tensors(from_tensors, quantized("int8"))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_quantised_tensor_by_tensor(kind, tmp_path):
    ours, _ = transformers()
    ours.save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    told = []
    names = quantize_checkpoint(
        QwenImageTransformer2DModel, tmp_path / "plain", tmp_path / "small", kind,
        dtype=torch.float32, max_shard_size=60_000, progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    expected = quantized(kind)
    assert LAYER in names and told[-1][0] == told[-1][1]
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    same_tensors(QwenImageTransformer2DModel.from_pretrained(tmp_path / "small"), expected)
    one = tmp_path / "one.safetensors"
    quantize_checkpoint(QwenImageTransformer2DModel, tmp_path / "plain", one, kind, dtype=torch.float32)
    write_single_file(expected, tmp_path / "two.safetensors")
    with safe_open(one, "pt") as a, safe_open(tmp_path / "two.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            assert torch.equal(
                a.get_tensor(name).view(-1).view(torch.uint8), b.get_tensor(name).view(-1).view(torch.uint8)
            )


def test_a_quantised_checkpoint_can_become_another_kind(tmp_path):
    ours = quantized("fp8")
    write_single_file(ours, tmp_path / "fp8.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**TRANSFORMER, "_class_name": "QwenImageTransformer2DModel"})
    )
    quantize_checkpoint(
        QwenImageTransformer2DModel,
        tmp_path / "fp8.safetensors",
        tmp_path / "int8",
        "int8",
        dtype=torch.float32,
    )
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "int8")
    assert relative(output(loaded), output(ours)) < 0.02


def test_rotated_files_are_streamed(tmp_path):
    ours = quantized("int8")
    write_single_file(ours, tmp_path / "int8.safetensors")
    for kind in ("int8", None):
        settings, part = read_component(
            tmp_path / "int8.safetensors", "transformer", config=dict(ours.config)
        )
        model = empty_module(lambda s=settings: QwenImageTransformer2DModel.from_config(s))
        if kind:
            quantize_(model, kind)
        adopt(model.eval().requires_grad_(False), part, device="cpu")
        if kind:
            assert torch.equal(model.get_submodule(LAYER).weight, ours.get_submodule(LAYER).weight)
        # without a kind, the codes are multiplied out, and the activations are not rounded
        assert relative(output(model), output(ours)) < (ROUNDING if kind else 0.02)


def test_incomplete_sources_write_nothing(tmp_path):
    ours, _ = transformers()
    tensors = ours.state_dict()
    del tensors[f"{LAYER}.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**TRANSFORMER, "_class_name": "QwenImageTransformer2DModel"})
    )
    with pytest.raises(ValueError, match="missing"):
        quantize_checkpoint(QwenImageTransformer2DModel, tmp_path / "x.safetensors", tmp_path / "y", "fp8")
    assert not (tmp_path / "y").exists()


def test_loras_have_no_place_in_a_single_file(tmp_path):
    ours = quantized("fp8")
    ours.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="A LoRA is attached"):
        write_single_file(ours, tmp_path / "x.safetensors")


def test_files_written_in_turn(tmp_path):
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.tensor(2.0).bfloat16(),
        "c": torch.arange(5, dtype=torch.int8),
    }
    entries = {"a": ("F32", (3, 2)), "b": ("BF16", ()), "c": ("I8", (5,))}
    path = tmp_path / "x.safetensors"
    write_safetensors_in_turn(path, entries, iter(tensors.items()), {"k": "v"})
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert read_header(path).metadata == {"k": "v"}
    for wrong in (
        dict(list(tensors.items())[:2]),
        {**tensors, "c": torch.zeros(4)},
        {**tensors, "d": torch.ones(1)},
    ):
        with pytest.raises(ValueError, match="announced"):
            write_safetensors_in_turn(tmp_path / "y.safetensors", entries, wrong.items())
        assert not (tmp_path / "y.safetensors").exists()
