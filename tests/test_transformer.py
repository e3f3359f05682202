import copy

import diffusers
import pytest
import torch
from components import FAMILY, TRANSFORMER, random, transformer_inputs, transformers
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import TaylorSeerCacheConfig
from peft import LoraConfig

from diffusers_qwenimage import QwenImageTransformer2DModel

# A packed batch changes only the order of additions in matrix products: a few fp32 roundings.
ROUNDING = 2e-6
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_against_diffusers(name, masked, batch):
    config, shapes = FAMILY[name]
    ours, stock = transformers(**config)
    inputs = transformer_inputs(shapes, batch, kind="use_additional_t_cond" in config)
    if config.get("zero_cond_t") and "additional_t_cond" in inputs:
        # Stock adds [B] embeddings of the kind to [2 B] timesteps: only B = 1 can be compared.
        if batch == 2:
            return
    if masked:
        inputs["encoder_hidden_states_mask"] = MASK[:batch]
    expected, got = stock(**inputs).sample, ours(**inputs).sample
    assert torch.equal(expected, got)

    names = [name for name, _ in stock.named_parameters()]
    gradients = dict(
        zip(
            names,
            torch.autograd.grad(expected.square().sum(), stock.parameters(), allow_unused=True),
            strict=True,
        )
    )
    for (key, _), gradient in zip(
        ours.named_parameters(),
        torch.autograd.grad(got.square().sum(), ours.parameters(), allow_unused=True),
        strict=True,
    ):
        if gradients[key] is None:
            assert gradient is None
        else:
            # relative to the largest entry: sums over tokens in another order
            assert (gradient - gradients[key]).abs().max() <= 1e-5 * gradients[key].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_diffusers(dtype):
    ours, stock = (model.to(dtype) for model in transformers())
    inputs = transformer_inputs([(1, 4, 6)])
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).sample, stock(**inputs).sample)


@pytest.mark.parametrize("name", FAMILY)
def test_packed_text_equals_separate_calls(name):
    config, shapes = FAMILY[name]
    ours, _ = transformers(**config)
    inputs = transformer_inputs(shapes, 3, kind="use_additional_t_cond" in config)
    texts = [random(length, 16, seed=length) for length in (3, 9, 1)]
    with torch.no_grad():
        together = ours(**{**inputs, "encoder_hidden_states": texts}).sample
        for index, text in enumerate(texts):
            one = {
                key: value[index : index + 1] if isinstance(value, torch.Tensor) else value[:1]
                for key, value in inputs.items()
            }
            alone = ours(**{**one, "encoder_hidden_states": text[None]}).sample
            assert (together[index : index + 1] - alone).abs().max() < ROUNDING


def test_packed_text_equals_diffusers_with_a_mask():
    ours, stock = transformers()
    inputs = transformer_inputs([(1, 4, 6)], 2)
    texts = [inputs["encoder_hidden_states"][0, :4], inputs["encoder_hidden_states"][1]]
    with torch.no_grad():
        expected = stock(**inputs, encoder_hidden_states_mask=MASK).sample
        got = ours(**{**inputs, "encoder_hidden_states": texts}).sample
    assert (expected - got).abs().max() < ROUNDING


@pytest.mark.parametrize("name", FAMILY)
def test_modulation_table_equals_the_blocks_own(name):
    config, shapes = FAMILY[name]
    ours, _ = transformers(**config)
    inputs = transformer_inputs(shapes, 1, kind="use_additional_t_cond" in config)
    sigmas = torch.tensor([0.7, 0.2])
    table = ours.tabulate_modulation(
        sigmas, dtype=torch.float32, additional_t_cond=inputs.get("additional_t_cond")
    )
    with torch.no_grad():
        for step, sigma in enumerate(sigmas):
            inputs["timestep"] = sigma[None]
            assert torch.equal(ours(**inputs).sample, ours(**inputs, modulation=table.at(step)).sample)


def test_modulation_table_includes_a_lora():
    ours, _ = transformers()
    ours.add_adapter(LoraConfig(r=4, target_modules=["img_mod.1", "txt_mod.1"], init_lora_weights=False))
    inputs = transformer_inputs([(1, 4, 6)])
    table = ours.tabulate_modulation(inputs["timestep"], dtype=torch.float32)
    with torch.no_grad():
        expected = ours(**inputs).sample
        assert torch.equal(expected, ours(**inputs, modulation=table.at(0)).sample)
        ours.disable_adapters()
        assert not torch.equal(expected, ours(**inputs).sample)


def test_offloaded_modulation_is_not_needed_on_the_device():
    ours, _ = transformers()
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad():
        expected = ours(**inputs).sample
        table = ours.tabulate_modulation(inputs["timestep"], dtype=torch.float32)
        assert not ours.modulation_is_offloaded
        ours.offload_modulation("meta")  # weights that cannot be used at all
        assert ours.modulation_is_offloaded
        assert torch.equal(expected, ours(**inputs, modulation=table.at(0)).sample)
        with pytest.raises(ValueError, match="load_modulation"):
            ours(**inputs)


def test_modulation_share_of_the_published_model():
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
    total = sum(parameter.numel() for parameter in model.parameters())
    modulation = sum(p.numel() for module in model._modulation_modules() for p in module.parameters())
    assert total == 20_430_401_088
    assert modulation == 60 * 2 * (3072 * 18432 + 18432)


def test_gradient_checkpointing_changes_nothing():
    ours, _ = transformers(zero_cond_t=True)
    inputs = transformer_inputs(FAMILY["edit-2511"][1], 2)
    inputs["encoder_hidden_states"] = [random(length, 16, seed=length) for length in (3, 9)]
    plain = torch.autograd.grad(ours(**inputs).sample.square().sum(), ours.parameters(), allow_unused=True)
    ours.enable_gradient_checkpointing()
    ours.train()
    saving = torch.autograd.grad(ours(**inputs).sample.square().sum(), ours.parameters(), allow_unused=True)
    for a, b in zip(plain, saving, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_controlnet_residuals_equal_diffusers():
    ours, stock = transformers()
    inputs = transformer_inputs([(1, 4, 6)])
    for count in (1, 2):
        residuals = [random(1, 24, 48, seed=index) for index in range(count)]
        with torch.no_grad():
            assert torch.equal(
                ours(**inputs, controlnet_block_samples=residuals).sample,
                stock(**inputs, controlnet_block_samples=residuals).sample,
            )


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_saved_weights_load_in_diffusers_and_back(tmp_path, max_shard_size):
    ours, stock = transformers(zero_cond_t=True)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    stock.save_pretrained(tmp_path / "stock", max_shard_size=max_shard_size)
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path / "ours")
    back = QwenImageTransformer2DModel.from_pretrained(tmp_path / "stock")
    inputs = transformer_inputs(FAMILY["edit-2511"][1])
    with torch.no_grad():
        expected = stock(**inputs).sample
        for loaded in (theirs, back):
            # Shards lie unaligned in the mapped file, where other kernels multiply them.
            assert (loaded(**inputs).sample - expected).abs().max() < ROUNDING
            for key, weight in loaded.state_dict().items():
                assert torch.equal(weight, stock.state_dict()[key])
    assert theirs.config.zero_cond_t and back.config.zero_cond_t


def test_config_fields_are_those_of_diffusers():
    ours, stock = transformers()
    assert dict(ours.config).keys() == dict(stock.config).keys()
    assert set(ours.state_dict()) == set(stock.state_dict())


def test_lora_equals_diffusers():
    ours, stock = transformers()
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "img_mlp.net.2", "txt_mod.1"]
    for model in (ours, stock):
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    ours.load_state_dict(stock.state_dict())
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad():
        for kwargs in ({}, {"attention_kwargs": {"scale": 0.3}}):
            assert torch.equal(ours(**inputs, **kwargs).sample, stock(**inputs, **kwargs).sample)


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e9),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ],
)
def test_step_caches_equal_diffusers(config):
    outputs = []
    for model in transformers():
        model.enable_cache(copy.deepcopy(config))
        assert model.is_cache_enabled
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(
                torch.cat([model(**transformer_inputs([(1, 4, 6)], seed=step)).sample for step in range(4)])
            )
        model.disable_cache()
    # The first block cache adds stored residuals: one rounding per block in another order.
    assert (outputs[0] - outputs[1]).abs().max() < ROUNDING
    assert torch.isfinite(outputs[0]).all()


def test_regional_compile_without_graph_breaks():
    ours, stock = transformers()
    ours.compile_repeated_blocks(fullgraph=True, backend="eager")
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad():
        assert torch.equal(ours(**inputs).sample, stock(**inputs).sample)
        texts = [random(length, 16, seed=length) for length in (3, 9)]
        ours(**{**transformer_inputs([(1, 4, 6)], 2), "encoder_hidden_states": texts})
    torch._dynamo.reset()


def test_whole_model_compiles_without_graph_breaks():
    ours, stock = transformers()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    inputs = transformer_inputs([(1, 4, 6)], 2)
    with torch.no_grad():
        for mask in (None, MASK):
            got = compiled(**inputs, encoder_hidden_states_mask=mask, return_dict=False)[0]
            assert (got - stock(**inputs, encoder_hidden_states_mask=mask).sample).abs().max() < ROUNDING
    torch._dynamo.reset()


def test_attention_backend_can_be_chosen():
    ours, stock = transformers()
    ours.set_attention_backend("_native_math")
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad():
        assert (ours(**inputs).sample - stock(**inputs).sample).abs().max() < ROUNDING
    with pytest.raises(ValueError, match="must be one of"):
        ours.set_attention_backend("none")


def test_group_offload_and_layerwise_casting_run():
    ours, stock = transformers()
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad():
        expected = stock(**inputs).sample
        ours.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
        assert torch.equal(ours(**inputs).sample, expected)
        cast, _ = transformers()
        cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        # fp8 keeps 3 bits of mantissa: a coarse copy of the same model
        assert (cast(**inputs).sample - expected).norm() / expected.norm() < 0.2


def test_device_map_and_dtype(tmp_path):
    ours, stock = transformers()
    stock.save_pretrained(tmp_path)
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert loaded.dtype == torch.bfloat16
    inputs = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) else v
        for k, v in transformer_inputs([(1, 4, 6)]).items()
    }
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, stock.to(torch.bfloat16)(**inputs).sample)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"timestep": None}, "are needed"),
        ({"img_shapes": [[(1, 5, 6)]]}, "30 tokens, but hidden_states has 24"),
        ({"guidance": torch.ones(1)}, "guidance-distilled"),
        ({"encoder_hidden_states_mask": torch.ones(1, 3)}, r"\(1, 3\) must have the shape \(1, 7\)"),
        ({"encoder_hidden_states": [torch.zeros(3, 16)] * 2}, "2 text embeddings for 1 samples"),
        (
            {"encoder_hidden_states": [torch.zeros(3, 16)], "encoder_hidden_states_mask": torch.ones(1, 3)},
            "no padding",
        ),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    ours, _ = transformers()
    with pytest.raises(ValueError, match=message):
        ours(**{**transformer_inputs([(1, 4, 6)]), **change})


def test_config_that_does_not_fit():
    with pytest.raises(ValueError, match="add up to the 16 of a head"):
        QwenImageTransformer2DModel(**{**TRANSFORMER, "axes_dims_rope": (8, 4, 8)})


def test_layered_needs_the_kind_of_picture():
    ours, _ = transformers(use_additional_t_cond=True)
    with pytest.raises(ValueError, match="additional_t_cond"):
        ours(**transformer_inputs([(1, 4, 6)]))
