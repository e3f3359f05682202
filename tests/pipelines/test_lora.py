"""LoRA in pipelines: every format gives the picture of the merged weights; what does not match is refused."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from components import pipelines, random, transformer_inputs, transformers
from hub_server import HubServer
from loading_fixtures import hub
from lora_made import MODULES, format_named, lora_tensors, write_lora
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffusers_qwenimage
from diffusers_qwenimage.lora.apply import changed_weight
from diffusers_qwenimage.lora.convert import convert_lora
from diffusers_qwenimage.lora.read import LoraFile, read_lora, read_state_dict
from diffusers_qwenimage.lora.targets import TARGETS
from diffusers_qwenimage.pipelines.adapters import attach_lora, detach_loras

__all__ = ["hub"]

# Pictures are compared at the tolerance asked for; equal weights differ by the order of fp32 sums.
TOLERANCE = 1e-4


@pytest.fixture
def pipe() -> diffusers_qwenimage.QwenImagePipeline:
    return pipelines("QwenImagePipeline")[0]


def picture(pipe: diffusers_qwenimage.QwenImagePipeline, steps: int = 2) -> Tensor:
    result: Tensor = pipe(
        prompt_embeds=random(1, 7, 16),
        num_inference_steps=steps,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return result


def with_merged_weights(file: LoraFile, strength: float = 1.0) -> Tensor:
    """The picture of a pipeline whose weights were changed by hand."""
    pipe = pipelines("QwenImagePipeline")[0]
    with torch.no_grad():
        for update in file.updates:
            linear = pipe.transformer.get_submodule(update.module)
            parameter = linear.bias if update.kind == "diff_b" else linear.weight
            parameter.copy_(changed_weight(parameter, update, strength))
    return picture(pipe)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return with_merged_weights(read_state_dict(lora_tensors()))


def test_the_lora_changes_the_picture(pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor) -> None:
    """Else every comparison below would hold for a LoRA that is not applied."""
    assert (picture(pipe) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gives_the_same_picture(
    target: str, pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor, tmp_path: Path
) -> None:
    source = write_lora(tmp_path / "source.safetensors", "kohya")
    output = tmp_path / ("out" if target == "peft" else "out.safetensors")
    convert_lora(source, output, target)
    pipe.load_lora_weights(str(output))
    assert (picture(pipe) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["onetrainer-legacy", "lycoris", "diffsynth-pipe-down", "comfyui-down"])
def test_spellings_that_stock_cannot_load(
    name: str, pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor
) -> None:
    pipe.load_lora_weights(lora_tensors(name))
    assert (picture(pipe) - expected).abs().max() < TOLERANCE


def test_against_diffusers(expected: Tensor, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a.safetensors", "opensource")
    stock = pipelines("QwenImagePipeline")[1]
    stock.load_lora_weights(str(source))
    result = stock(
        prompt_embeds=random(1, 7, 16),
        prompt_embeds_mask=torch.ones(1, 7, dtype=torch.long),
        num_inference_steps=2,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert (result - expected).abs().max() < TOLERANCE


def test_strengths_fusing_and_removing(pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor) -> None:
    plain = picture(pipe)
    pipe.load_lora_weights(lora_tensors("kohya"), adapter_name="style")
    pipe.set_adapters("style", 0.25)
    quarter = with_merged_weights(read_state_dict(lora_tensors()), 0.25)
    assert (picture(pipe) - quarter).abs().max() < TOLERANCE
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora(adapter_names=["style"])
    assert (picture(pipe) - expected).abs().max() < TOLERANCE
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert (picture(pipe) - plain).abs().max() < TOLERANCE
    pipe.enable_lora()
    assert (picture(pipe) - expected).abs().max() < TOLERANCE
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), plain) or (picture(pipe) - plain).abs().max() < TOLERANCE


def test_several_adapters(pipe: diffusers_qwenimage.QwenImagePipeline, tmp_path: Path) -> None:
    from diffusers_qwenimage.lora.merge import merge_loras

    paths = [
        write_lora(tmp_path / "a.safetensors", "diffsynth", alpha=None, rank=2),
        write_lora(tmp_path / "b.safetensors", "kohya", seed=1, rank=3, alpha=1.0),
    ]
    for path, name in zip(paths, "ab", strict=True):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, -1.0])
    both = picture(pipe)
    merge_loras([(paths[0], 0.5), (paths[1], -1.0)], tmp_path / "c.safetensors")
    pipe.delete_adapters(["a", "b"])
    pipe.load_lora_weights(str(tmp_path / "c.safetensors"), adapter_name="c")
    assert (picture(pipe) - both).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(str(paths[0]), adapter_name="c")


def test_hotswap(pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    pipe.load_lora_weights(lora_tensors("kohya", seed=1), adapter_name="style")
    layers = {name: id(module) for name, module in pipe.transformer.named_modules()}
    pipe.load_lora_weights(lora_tensors("diffsynth", alpha=None), adapter_name="style", hotswap=True)
    assert {name: id(module) for name, module in pipe.transformer.named_modules()} == layers
    expected = with_merged_weights(read_state_dict(lora_tensors("diffsynth", alpha=None)))
    assert (picture(pipe) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("factored", [False, True])
def test_lokr(factored: bool, pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    tensors: dict[str, Tensor] = {}
    for module, (out, width) in {
        MODULES[0]: (48, 48),
        "transformer_blocks.0.img_mlp.net.2": (48, 192),
    }.items():
        name = f"lycoris_{module.replace('.', '_')}"
        tensors[f"{name}.lokr_w1"] = random(4, 4) * 0.3
        if factored:
            tensors[f"{name}.lokr_w2_a"] = random(out // 4, 3) * 0.3
            tensors[f"{name}.lokr_w2_b"] = random(3, width // 4) * 0.3
        else:
            tensors[f"{name}.lokr_w2"] = random(out // 4, width // 4) * 0.3
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    plain = picture(pipe)
    pipe.load_lora_weights(tensors, adapter_name="kron")
    wanted = with_merged_weights(read_state_dict(tensors))
    assert (plain - wanted).abs().max() > 10 * TOLERANCE
    assert (picture(pipe) - wanted).abs().max() < TOLERANCE


def test_loha_and_dora(pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    module = MODULES[0]
    name = f"lora_unet_{module.replace('.', '_')}"
    loha = {
        f"{name}.hada_w{i}_{j}": random(*((48, 3) if j == "a" else (3, 48)), seed=i) * 0.5
        for i in (1, 2)
        for j in "ab"
    }
    pipe.load_lora_weights(loha, adapter_name="loha")
    wanted = with_merged_weights(read_state_dict(loha))
    assert (picture(pipe) - wanted).abs().max() < TOLERANCE
    pipe.delete_adapters("loha")
    dora = lora_tensors("kohya", modules=MODULES[:4])
    for module in MODULES[:4]:
        dora[f"lora_unet_{module.replace('.', '_')}.dora_scale"] = random(48, 1).abs() + 0.2
    pipe.load_lora_weights(dora, adapter_name="dora")
    wanted = with_merged_weights(read_state_dict(dora))
    assert (picture(pipe) - wanted).abs().max() < TOLERANCE


def test_refusals(pipe: diffusers_qwenimage.QwenImagePipeline, tmp_path: Path) -> None:
    module = MODULES[0]
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"unet.conv.lora_down.weight": torch.ones(2, 2)}, "none of its keys.*unknown key"),
        ({"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(2, 2)}, "another model .FLUX"),
        ({"decoder.up_blocks.0.conv.weight": torch.ones(2, 2)}, "it is no LoRA"),
        (lora_tensors("kohya", hidden=32), "does not fit.*a change of"),
        (lora_tensors(modules=("transformer_blocks.9.attn.to_q",)), "matches no layer.*opensource"),
        (lora_tensors(modules=(MODULES[0], "transformer_blocks.9.attn.to_q")), "does not exist there"),
        ({f"diffusion_model.{module}.diff": torch.ones(48, 48)}, "full difference.*bake"),
        ({f"diffusion_model.{module}.diff_b": torch.ones(48)}, "difference of a bias"),
    ]
    for tensors, reason in cases:
        with pytest.raises(ValueError, match=reason):
            pipe.load_lora_weights(tensors)
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x02pickle")
    with pytest.raises(ValueError, match="pickle"):
        pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert not getattr(pipe.transformer, "peft_config", {})


def test_text_encoder_part_is_not_applied_in_silence(
    pipe: diffusers_qwenimage.QwenImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    name = "lora_te_model_layers_0_self_attn_q_proj"
    extra = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
    pipe.load_lora_weights({**lora_tensors("kohya"), **extra})
    assert "that part is not applied" in caplog.text


def test_saving_states_the_scale(
    pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor, tmp_path: Path
) -> None:
    pipe.load_lora_weights(lora_tensors("kohya"), adapter_name="style")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=pipe.transformer)
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    config = pipe.transformer.peft_config["style"].to_dict()
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=state,
        weight_name="b.safetensors",
        transformer_lora_adapter_metadata=config,
    )
    name = "pytorch_lora_weights.safetensors"
    assert load_file(tmp_path / name).keys() == load_file(tmp_path / "b.safetensors").keys()
    with safe_open(tmp_path / name, "pt") as opened:
        saved = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert saved["transformer.r"] == 4 and saved["transformer.lora_alpha"] == 2
    assert set(saved) == {
        f"transformer.{field}"
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    }
    for ours in (True, False):
        fresh = pipelines("QwenImagePipeline")[0 if ours else 1]
        fresh.load_lora_weights(str(tmp_path), weight_name=name)
        for module in MODULES:
            layer = fresh.transformer.get_submodule(module)
            delta = layer.get_delta_weight(layer.active_adapters[0]).detach()
            wanted = pipe.transformer.get_submodule(module).get_delta_weight("style").detach()
            torch.testing.assert_close(delta, wanted)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    assert (picture(pipe) - expected).abs().max() < TOLERANCE


def test_saving_refuses(pipe: diffusers_qwenimage.QwenImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Nothing to save"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="there is none"):
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=pipe.transformer)
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_lora_weights(tmp_path, lora_tensors(), safe_serialization=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_storage_keeps_the_adapter_exact(dtype: torch.dtype) -> None:
    transformer = transformers()[0].to(dtype)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    tensors = lora_tensors("kohya", dtype=dtype, modules=MODULES[:-1])
    attach_lora(transformer, read_state_dict(tensors), adapter_name="style")
    for module in MODULES[:-1]:
        layer = transformer.get_submodule(module)
        assert layer.base_layer.weight.dtype == torch.float8_e4m3fn
        name = f"lora_unet_{module.replace('.', '_')}"
        assert torch.equal(layer.lora_A["style"].weight, tensors[f"{name}.lora_down.weight"])
        assert torch.equal(layer.lora_B["style"].weight, tensors[f"{name}.lora_up.weight"])
    inputs = transformer_inputs([(1, 4, 6)])
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    with torch.no_grad():
        with_lora = transformer(**inputs).sample
        detach_loras(transformer)
        assert not torch.equal(transformer(**inputs).sample, with_lora) and torch.isfinite(with_lora).all()


def test_modulation_tables_hold_the_adapter(pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    transformer = pipe.transformer
    timesteps = torch.tensor([0.9, 0.3])
    before = transformer.tabulate_modulation(timesteps, dtype=torch.float32)
    attach_lora(transformer, read_state_dict(lora_tensors(modules=("transformer_blocks.0.img_mod.1",))))
    after = transformer.tabulate_modulation(timesteps, dtype=torch.float32)
    assert not torch.equal(before.image[:, 0], after.image[:, 0])
    assert torch.equal(before.image[:, 1], after.image[:, 1]) and torch.equal(before.text, after.text)


def test_strengths_beside_each_other(pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    transformer = pipe.transformer
    first, second = (read_state_dict(lora_tensors("kohya", seed=seed)) for seed in (0, 1))
    attach_lora(transformer, first, strength=0.5)
    attach_lora(transformer, second, strength=2.0)
    ours = picture(pipe)
    other = pipelines("QwenImagePipeline")[0]
    other.load_lora_weights(lora_tensors("kohya", seed=0), adapter_name="a")
    other.load_lora_weights(lora_tensors("kohya", seed=1), adapter_name="b")
    other.set_adapters(["a", "b"], [0.5, 2.0])
    assert (picture(other) - ours).abs().max() < TOLERANCE
    detach_loras(transformer)
    assert not any("lora" in name for name, _ in transformer.named_parameters())


def test_from_a_folder(pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write_lora(inner / "one.safetensors", "kohya")
    pipe.load_lora_weights(str(tmp_path), subfolder="inner", adapter_name="x")
    assert (picture(pipe) - expected).abs().max() < TOLERANCE
    write_lora(inner / "two.safetensors")
    with pytest.raises(ValueError, match=r"several files.*one\.safetensors, two\.safetensors"):
        pipe.load_lora_weights(inner, adapter_name="y")
    with pytest.raises(FileNotFoundError, match="three"):
        pipe.load_lora_weights(inner, weight_name="three.safetensors", adapter_name="z")
    with pytest.raises(FileNotFoundError):
        pipe.load_lora_weights(str(tmp_path / "missing"))


def test_from_a_hub(
    pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor, hub: HubServer, tmp_path: Path
) -> None:
    write_lora(tmp_path / "style.safetensors", "lycoris")
    hub.add_folder("me/lora", tmp_path)
    pipe.load_lora_weights("me/lora", weight_name="style.safetensors", adapter_name="a")
    assert (picture(pipe) - expected).abs().max() < TOLERANCE
    pipe.delete_adapters("a")
    pipe.load_lora_weights("modelscope:me/lora/style.safetensors", adapter_name="b")
    assert (picture(pipe) - expected).abs().max() < TOLERANCE


def test_hotswap_of_another_rank(pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora_tensors("kohya", rank=2, seed=1), adapter_name="style")
    pipe.load_lora_weights(lora_tensors("diffsynth", rank=8, alpha=None), adapter_name="style", hotswap=True)
    expected = with_merged_weights(read_state_dict(lora_tensors("diffsynth", rank=8, alpha=None)))
    assert (picture(pipe) - expected).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="no existing adapter"):
        pipe.load_lora_weights(lora_tensors("kohya"), adapter_name="other", hotswap=True)


def test_hotswap_does_not_recompile(pipe: diffusers_qwenimage.QwenImagePipeline) -> None:
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora_tensors("kohya", rank=4, seed=1), adapter_name="style")
    compiled = torch.compile(pipe.transformer, backend="eager")
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad():
        first = compiled(**inputs).sample
        pipe.load_lora_weights(
            lora_tensors("diffsynth", rank=8, alpha=None), adapter_name="style", hotswap=True
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = compiled(**inputs).sample
        assert (first - second).abs().max() > 100 * TOLERANCE
        assert (second - pipe.transformer(**inputs).sample).abs().max() < TOLERANCE


@pytest.mark.parametrize("first", ["lora", "streaming"])
def test_streamed_weights(first: str, pipe: diffusers_qwenimage.QwenImagePipeline, expected: Tensor) -> None:
    """diffusers' group offload before or after the LoRA."""

    def stream() -> None:
        here = torch.device("cpu")
        pipe.transformer.enable_group_offload(here, here, offload_type="leaf_level")

    if first == "streaming":
        stream()
    pipe.load_lora_weights(lora_tensors("kohya"))
    if first == "lora":
        stream()
    assert (picture(pipe) - expected).abs().max() < TOLERANCE


def test_the_embedding_of_layered() -> None:
    transformer = transformers(use_layer3d_rope=True, use_additional_t_cond=True)[0]
    module = "transformer.time_text_embed.addition_t_embedding"
    tensors = {
        f"{module}.lora_embedding_A": random(3, 2),
        f"{module}.lora_embedding_B": random(48, 3),
        **lora_tensors("diffusers", alpha=None),
    }
    file = read_state_dict(tensors)
    inputs = transformer_inputs([(1, 4, 6)] * 4, kind=True)
    with torch.no_grad():
        plain = transformer(**inputs).sample
        attach_lora(transformer, file)
        loaded = transformer(**inputs).sample
        detach_loras(transformer)
        for update in file.updates:
            weight = transformer.get_submodule(update.module).weight
            weight.copy_(changed_weight(weight, update))
        merged = transformer(**inputs).sample
    assert (plain - merged).abs().max() > 100 * TOLERANCE
    assert (loaded - merged).abs().max() < TOLERANCE


def test_state_dict_of_a_file(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", "kohya")
    state, config = diffusers_qwenimage.QwenImagePipeline.lora_state_dict(path, return_lora_metadata=True)
    stock = diffusers.QwenImagePipeline.lora_state_dict(str(path))
    assert state.keys() == stock.keys() and config["transformer.lora_alpha"] == 2
    assert format_named("diffusers").render(MODULES[0], "down") in state
    save_file(state, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert read_lora(tmp_path / "b.safetensors").updates[0].scale.value == 0.5
