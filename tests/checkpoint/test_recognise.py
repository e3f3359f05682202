"""Components told by their keys, configs told by shapes, weights into modules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageControlNetModel, QwenImageTransformer2DModel
from model_files import PUBLISHED_HEADS, TRANSFORMER, tiny_text_encoder, tiny_transformer, tiny_vae
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_qwenimage.checkpoint import (
    assign_weights,
    empty_module,
    find_components,
    from_tensors,
    infer_config,
    load_transformer_file,
    open_checkpoint,
    read_component,
    sidecar_config,
)

State = dict[str, Tensor]


def state(module: nn.Module) -> State:
    return {name: value.contiguous() for name, value in module.state_dict().items()}


def old_keys(tensors: State) -> State:
    """The text encoder's keys as published files have them."""
    renamed = {name.replace("model.visual.", "visual."): value for name, value in tensors.items()}
    return {name.replace("model.language_model.", "model."): value for name, value in renamed.items()}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit."]
)
def test_the_transformer_is_recognised_under_every_prefix(prefix: str) -> None:
    tensors = state(tiny_transformer())
    found = find_components(from_tensors(prefixed(prefix)(tensors)))
    assert list(found) == ["transformer"]
    assert dict(found["transformer"].read()).keys() == tensors.keys()


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "pipe.vae."])
def test_the_vae_is_recognised(prefix: str) -> None:
    tensors = state(tiny_vae())
    found = find_components(from_tensors(prefixed(prefix)(tensors)))
    assert list(found) == ["vae"]
    assert list(found["vae"].tensors) == list(tensors)


@pytest.mark.parametrize("rename", [old_keys, dict], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("prefix", ["", "text_encoder.", "text_encoders.qwen25_7b.transformer."])
def test_both_key_layouts_of_the_text_encoder_are_recognised(
    rename: Callable[[State], State], prefix: str
) -> None:
    tensors = state(tiny_text_encoder(50))
    found = find_components(from_tensors(prefixed(prefix)(rename(tensors))))
    assert list(found) == ["text_encoder"]
    read = dict(found["text_encoder"].read())
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_an_all_in_one_file_is_split() -> None:
    parts = {
        "model.diffusion_model.": state(tiny_transformer()),
        "first_stage_model.": state(tiny_vae()),
        "text_encoders.qwen25_7b.transformer.": old_keys(state(tiny_text_encoder(50))),
    }
    tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
    found = find_components(from_tensors(tensors))
    assert set(found) == {"transformer", "vae", "text_encoder"}
    assert sum(len(part.tensors) for part in found.values()) == len(tensors)
    with pytest.raises(ValueError, match=r"1 keys of no known component: 'model.ema'"):
        find_components(from_tensors({**tensors, "model.ema": torch.zeros(1)}))


def test_parts_of_an_unknown_layout_are_passed_over_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {**state(tiny_transformer()), "first_stage_model.conv1.weight": torch.zeros(1)}
    found = find_components(from_tensors(tensors))
    assert "first_stage_model.conv1.weight" not in found["transformer"].tensors
    assert "passed over 1 tensors" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"x.weight": torch.zeros(1), "y": torch.zeros(1)},
            r"not recognised\. Expected .*first keys: 'x.weight', 'y'",
        ),
        ({"transformer_blocks.0.img_mod.1.lora_A.weight": torch.zeros(1)}, "it is a LoRA"),
        ({"lora_unet_transformer_blocks_0_img_mod_1.lora_down.weight": torch.zeros(1)}, "it is a LoRA"),
        ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "another model family"),
        ({"decoder.middle.0.residual.0.gamma": torch.zeros(1)}, "ComfyUI and Wan"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)}, "without the vision tower"),
    ],
)
def test_what_is_not_recognised_is_named(tensors: State, said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match=said) as caught:
        find_components(open_checkpoint(tmp_path / "strange.safetensors"))
    assert "strange.safetensors" in str(caught.value)


def test_a_controlnet_is_not_taken_for_a_transformer() -> None:
    controlnet = QwenImageControlNetModel(**TRANSFORMER)
    with pytest.raises(ValueError, match="it is a ControlNet"):
        find_components(from_tensors(state(controlnet)))


def test_a_component_twice_is_an_error() -> None:
    tensors = state(tiny_transformer())
    with pytest.raises(ValueError, match="holds the transformer twice"):
        find_components(from_tensors({**tensors, **prefixed("transformer.")(tensors)}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "joint_attention_dim": 24},
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
    ],
)
def test_the_config_of_a_transformer_is_told_by_its_shapes(changes: dict[str, object]) -> None:
    model = tiny_transformer(**PUBLISHED_HEADS, **changes)
    config = infer_config("transformer", from_tensors(state(model)))
    assert {name: model.config[name] for name in config} == config


def test_comfyuis_marker_says_zero_cond_t(tmp_path: Path) -> None:
    model = tiny_transformer(**PUBLISHED_HEADS)
    tensors = {**state(model), "__index_timestep_zero__": torch.zeros(())}
    save_file(prefixed("model.diffusion_model.")(tensors), tmp_path / "edit.safetensors")
    loaded = load_transformer_file(QwenImageTransformer2DModel, tmp_path / "edit.safetensors", dtype=None)
    assert loaded.config.zero_cond_t is True
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_channels": 4},
        {"num_res_blocks": 2, "dim_mult": [1, 2, 4], "temperal_downsample": [True, False]},
    ],
)
def test_the_config_of_a_vae_is_told_by_its_shapes(changes: dict[str, object]) -> None:
    model = tiny_vae(**changes)
    config = infer_config("vae", from_tensors(state(model)))
    assert {name: model.config[name] for name in config} == config
    rebuilt = empty_module(lambda: AutoencoderKLQwenImage.from_config(config))
    assign_weights(rebuilt, from_tensors(state(model)), dtype=None)
    assert rebuilt.config.latents_mean == model.config.latents_mean


@pytest.mark.parametrize(
    ("component", "module"),
    [
        ("transformer", tiny_transformer),
        ("vae", lambda: tiny_vae(z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)),
        ("text_encoder", lambda: tiny_text_encoder(50)),
    ],
)
def test_a_config_that_shapes_do_not_tell_is_asked_for(
    component: str, module: Callable[[], nn.Module]
) -> None:
    with pytest.raises(ValueError, match=r"cannot be told from its shapes.*config\.json"):
        infer_config(component, from_tensors(state(module())))


def test_a_config_beside_the_file_counts_and_an_argument_beats_it(tmp_path: Path) -> None:
    model = tiny_transformer(zero_cond_t=True)
    model.save_pretrained(tmp_path)
    config, part = read_component(tmp_path, "transformer")
    assert config["zero_cond_t"] is True and config["axes_dims_rope"] == [4, 6, 6]
    assert set(part.tensors) == set(model.state_dict())
    config, _ = read_component(tmp_path, "transformer", config={**TRANSFORMER, "zero_cond_t": False})
    assert config["zero_cond_t"] is False


def test_a_config_of_something_else_beside_the_file_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    assert sidecar_config("vae", file) is None
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert sidecar_config("transformer", file) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        sidecar_config("vae", file)


def test_another_component_than_asked_for_is_an_error(tmp_path: Path) -> None:
    save_file(state(tiny_vae()), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds the vae, but the transformer is needed"):
        read_component(tmp_path / "vae.safetensors", "transformer")
    with pytest.raises(ValueError, match="holds the vae, but not the transformer"):
        load_transformer_file(QwenImageTransformer2DModel, state(tiny_vae()))


def test_unknown_missing_and_misshapen_tensors_are_listed() -> None:
    tensors = state(tiny_transformer())
    cases = {
        r"1 unknown \('surplus'\)": {**tensors, "surplus": torch.zeros(1)},
        r"1 missing \('img_in.bias'\)": {k: v for k, v in tensors.items() if k != "img_in.bias"},
        r"1 of another shape \('img_in.bias \(3,\) instead of \(32,\)'\)": {
            **tensors,
            "img_in.bias": torch.zeros(3),
        },
    }
    for said, changed in cases.items():
        model = empty_module(tiny_transformer)
        with pytest.raises(ValueError, match=said):
            assign_weights(model, from_tensors(changed), dtype=None)
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_arrive_in_the_wanted_type(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    loaded = load_transformer_file(
        QwenImageTransformer2DModel, tmp_path / "diffusion_pytorch_model.safetensors", dtype=dtype
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype or torch.float32}
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k].to(v.dtype)) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_types_that_cannot_be_computed_in_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="Weights cannot be loaded as .*bfloat16"):
        load_transformer_file(
            QwenImageTransformer2DModel, state(tiny_transformer(**PUBLISHED_HEADS)), dtype=dtype
        )


# Tensors and parameters of the published models.
PUBLISHED = {
    "transformer": (1933, 20_430_401_088),
    "vae": (194, 126_892_531),
    "text_encoder": (729, 8_292_166_656),
}


@pytest.mark.parametrize("component", PUBLISHED)
def test_the_published_sizes_are_told_by_shapes(component: str) -> None:
    """Built from the config that the shapes say, the module has the same tensors again."""
    builders: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
        "transformer": lambda config: QwenImageTransformer2DModel(**config),
        "vae": lambda config: AutoencoderKLQwenImage(**config),
        "text_encoder": lambda config: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)),
    }
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    sizes = {
        "transformer": {},
        "vae": {},
        "text_encoder": {"text_config": {**text, **heads}, "vision_config": {"hidden_size": 1280}},
    }[component]
    published = empty_module(lambda: builders[component](sizes)).state_dict()
    assert (len(published), sum(value.numel() for value in published.values())) == PUBLISHED[component]

    config = infer_config(component, from_tensors(published))
    rebuilt = empty_module(lambda: builders[component](config)).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in published.items()}
