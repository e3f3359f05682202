"""Layers and models in 8 bits: exactness of the paths, casting, LoRA, gradients."""

import copy

import pytest
import torch
from components import transformer_inputs
from fused_cases import DEVICE, needs_triton, random, relative
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from test_fused import BACKENDS, MASK, TARGETS, add_lora, both, model, moved
from torch import nn

from diffusers_qwenimage import projections, quantize
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.quantize import KINDS, QuantizedLinear, is_quantized, quantize_

# Codes differ by one where sums in another order fall beside a border between two: a step is 6 % (fp8) or a
# 127th of the largest (int8), but few values are that near a border.
BORDER = 5e-3
# Relative error of a product of normal values: fp8 rounds inputs and weights by 2.6 % each (3 bits of
# mantissa), storage the weights alone; int8 by a 254th of the row's largest.
EXPECTED = {"fp8": 0.045, "int8": 0.015, "fp8-storage": 0.032}


def linear(inputs=64, outputs=48, *, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_near_the_one_it_was(kind, bias):
    plain = linear(bias=bias)
    layer = QuantizedLinear.from_linear(plain, kind)
    assert layer.weight.element_size() == 1 and not layer.weight.requires_grad
    assert layer.weight_scale.shape == (48, 1) and layer.weight_scale.dtype == torch.float32
    for shape in ((7, 64), (2, 5, 64), (1, 64), (0, 64)):
        x = random(*shape)
        got = layer(x)
        assert got.shape == (*shape[:-1], 48) and got.dtype == x.dtype
        if x.numel():
            assert 0 < relative(got, plain(x)) < EXPECTED[kind]
    dequantized = nn.functional.linear(random(7, 64), layer.dequantized(torch.float32), layer.bias)
    assert relative(dequantized, plain(random(7, 64))) < EXPECTED["fp8-storage"]


def test_int8_survives_outliers_by_rotation():
    plain, x = linear(256, 48), random(9, 256)
    x[:, 3] *= 100
    layer = QuantizedLinear.from_linear(plain, "int8")
    assert layer.rotation == 256
    with torch.no_grad():
        unrotated = QuantizedLinear.from_linear(plain, "fp8")
        rounded = x / (x.abs().amax(1, keepdim=True) / 127)
        naive = plain((rounded.round()) * (x.abs().amax(1, keepdim=True) / 127))
    assert relative(layer(x), plain(x)) < 0.02 < relative(naive, plain(x)) * 2
    assert relative(unrotated(x), plain(x)) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_casting_and_moving_keeps_weight_and_scale(kind):
    layer = QuantizedLinear.from_linear(linear(), kind)
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    x = random(3, 64)
    expected = layer(x)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float(), copy.deepcopy):
        moved_layer = cast(layer)
        assert torch.equal(moved_layer.weight.view(torch.int8), weight.view(torch.int8))
        assert (
            torch.equal(moved_layer.weight_scale, scale) and moved_layer.weight_scale.dtype == torch.float32
        )
    assert layer.bias.dtype == torch.float32
    assert relative(layer(x), expected) < 1e-2  # the bias went through half precision
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta").weight.is_meta and layer.weight.dtype == weight.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_inputs_and_bias(kind):
    layer = QuantizedLinear.from_linear(linear(), kind)
    layer.bias.requires_grad_()
    x = random(2, 3, 64).requires_grad_()
    layer(x).square().sum().backward()
    with torch.no_grad():
        y = layer(x)
        expected = (2 * y) @ layer.dequantized(torch.float32)
    assert relative(x.grad, expected) < 1e-5 and relative(layer.bias.grad, 2 * y.sum((0, 1))) < 1e-5


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match="Choose one of fp8, int8, fp8-storage"):
        quantize_(linear(), "fp4")
    with pytest.raises(ValueError, match="multiples of 16"):
        QuantizedLinear(40, 48, kind="fp8")
    broken = linear()
    broken.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        QuantizedLinear.from_linear(broken, "fp8")
    odd = nn.ModuleDict({"odd": linear(40, 48), "even": linear()})
    assert quantize_(odd, "fp8") == ["even"] and type(odd["odd"]) is nn.Linear
    assert quantize_(odd, "fp8") == ["even"]
    with pytest.raises(ValueError, match="even is fp8 already"):
        quantize_(odd, "int8")


def test_which_layers_are_quantised():
    ours = model()
    assert not is_quantized(ours)
    names = quantize_(ours, "fp8", skip=(*quantize.SKIPPED, "img_mlp.net.2", "transformer_blocks.1.attn"))
    assert is_quantized(ours)
    assert "transformer_blocks.0.attn.to_q" in names and "transformer_blocks.1.txt_mlp.net.2" in names
    for name, module in ours.named_modules():
        assert isinstance(module, QuantizedLinear) == (name in names)
    assert not any("mod" in name or "img_mlp.net.2" in name or "1.attn" in name for name in names)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 32))
    quantize_(empty, "int8")
    assert empty[0].weight.is_meta and empty[0].weight.dtype == torch.int8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_path_equals_the_plain_one(kind, backend):
    ours = model(zero_cond_t=True)
    shapes = [(1, 2, 3), (1, 2, 2)]
    two = transformer_inputs(shapes, 2)
    batches = {
        "one": transformer_inputs(shapes),
        "packed": {**two, "encoder_hidden_states": [random(length, 16, seed=length) for length in (3, 9)]},
        "masked": {**two, "encoder_hidden_states_mask": MASK},
    }
    with torch.no_grad(), use_backend("off"):
        exact = {case: ours(**moved(inputs)).sample for case, inputs in batches.items()}
    quantize_(ours, kind)
    for case, inputs in batches.items():
        if case != "packed" and backend == "triton":
            continue  # the interpreter is slow
        plain, got = both(ours, moved(inputs), backend)
        assert relative(got, plain) < BORDER, case
        assert relative(got, exact[case]) < 0.02, case
    attn = ours.transformer_blocks[0].attn
    for name in ("weight", "weight_scale", "bias"):
        assert (
            projections.joined([getattr(part, name) for part in (attn.to_q, attn.to_k, attn.to_v)])
            is not None
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["quantize", "lora"])
def test_lora_before_and_after(kind, first):
    ours = model()
    inputs = moved(transformer_inputs([(1, 2, 3)], 2))
    if first == "quantize":
        names = quantize_(ours, kind, skip=quantize.OUTSIDE_BLOCKS)
        add_lora(ours, target_modules=TARGETS)
    else:
        add_lora(ours, target_modules=TARGETS)
        names = quantize_(ours, kind, skip=quantize.OUTSIDE_BLOCKS)
    assert len(names) == 2 * 14 and not any("base_layer" in name or "lora" in name for name in names)
    layer = ours.transformer_blocks[0].attn.to_q
    assert type(layer) is LoraLinear and type(layer.base_layer) is QuantizedLinear
    for kwargs in ({}, {"attention_kwargs": {"scale": 0.3}}):
        plain, got = both(ours, {**inputs, **kwargs}, "reference")
        assert relative(got, plain) < BORDER
    ours.disable_adapters()
    without = both(ours, inputs, "reference")
    assert relative(without[1], without[0]) < BORDER and relative(without[0], plain) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_lora_is_trained_on_a_quantised_base(kind):
    ours = model()
    quantize_(ours, kind)
    ours.add_adapter(LoraConfig(r=4, target_modules=["to_q", "img_mlp.net.2"]))
    ours.train()
    ours(**moved(transformer_inputs([(1, 2, 3)]))).sample.square().sum().backward()
    # up is zero at the start, so the gradient is that of up
    trained = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(trained) == 4 and all("lora_B" in name for name in trained)


def test_weights_that_are_replaced_between_calls_are_read_anew():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    quantize_(ours, "fp8")
    before, _ = both(ours, inputs, "reference")
    for module in ours.modules():
        if isinstance(module, QuantizedLinear):  # as offloading does
            module.weight.data = module.weight.data.clone()
            module.weight_scale = module.weight_scale * 2
            module.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
    plain, got = both(ours, inputs, "reference")
    assert relative(got, plain) < BORDER and relative(plain, before) > 0.1


@needs_triton
def test_a_model_that_ran_before_is_laid_out_anew():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    with torch.no_grad(), use_backend("reference"):
        ours(**inputs)
        quantize_(ours, "fp8")
        ours(**inputs)
    attn = ours.transformer_blocks[0].attn
    for names in projections.GROUPS:
        assert projections.joined([getattr(attn, name).weight for name in names]) is not None


def test_kernels_are_used_by_layers_called_alone():
    layer, x = QuantizedLinear.from_linear(linear(), "int8"), random(5, 64)
    expected = layer(x)
    with use_backend("triton"):
        assert relative(layer(x), expected) < BORDER
