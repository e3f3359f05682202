"""The fused training path against autograd on the plain path."""

import pytest
import torch
from peft import LoraConfig

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.fused_training import Keep, why_not_trained
from diffusers_qwenimage.kernels import use_backend

TARGETS = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
)
ATTENTION_ONLY = ("to_q", "to_v", "to_out.0")
GRIDS = (3, 5)


def model(targets=TARGETS, dtype=torch.float32, lora_dtype=torch.float32, **changes):
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    for name, parameter in transformer.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name and parameter.ndim == 1 else 0.0, 0.2)
    transformer.to(dtype).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **changes))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.normal_(0, 0.2).to(lora_dtype)
    return transformer.train()


def arguments(batch, lengths, dtype=torch.float32):
    torch.manual_seed(1)
    texts = [torch.randn(length, 24, dtype=dtype) for length in lengths]
    return {
        "hidden_states": torch.randn(batch, GRIDS[0] * GRIDS[1], 16, dtype=dtype),
        "encoder_hidden_states": texts,
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_shapes": [[(1, *GRIDS)]] * batch,
        "return_dict": False,
    }


def gradients(transformer, inputs, backend):
    transformer.zero_grad()
    with use_backend(backend):
        velocity = transformer(**inputs)[0]
    torch.manual_seed(2)
    names = names_of_graph(velocity.grad_fn)
    assert ("_BlockBackward" in names) == (backend != "off")
    (velocity.float() * torch.randn(velocity.shape)).sum().backward()
    found = {
        name: parameter.grad for name, parameter in transformer.named_parameters() if parameter.requires_grad
    }
    return velocity.detach(), found


def names_of_graph(node):
    """Names of the operations that were recorded."""
    names, open_nodes, seen = set(), [node], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            open_nodes += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("keep", [keep.value for keep in Keep])
@pytest.mark.parametrize("targets", [TARGETS, ATTENTION_ONLY])
@pytest.mark.parametrize("lengths", [(7,), (7, 7), (7, 4, 1)])
def test_gradients_equal_autograd(keep, targets, lengths):
    transformer = model(targets)
    inputs = arguments(len(lengths), lengths)
    expected, plain = gradients(transformer, inputs, "off")
    for block in transformer.transformer_blocks:
        block.keep = keep
    got, fused = gradients(transformer, inputs, "reference")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert plain.keys() == fused.keys()
    for name, gradient in plain.items():
        assert (gradient is None) == (fused[name] is None), name
        if gradient is not None:  # fp32, sums in another order
            largest = gradient.abs().max().item()
            torch.testing.assert_close(fused[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_keeping_less_changes_nothing():
    transformer = model()
    inputs = arguments(2, (7, 4))
    results = []
    for keep in Keep:
        for block in transformer.transformer_blocks:
            block.keep = keep.value
        results.append(gradients(transformer, inputs, "reference"))
    for velocity, found in results[1:]:
        assert torch.equal(velocity, results[0][0])
        for name, gradient in results[0][1].items():
            assert gradient is found[name] is None or torch.equal(gradient, found[name]), name


def test_masters_in_fp32_are_no_further_from_the_truth_than_autograd_in_bf16():
    inputs = arguments(2, (7, 4), torch.bfloat16)
    exact = {**inputs, "hidden_states": inputs["hidden_states"].float()}
    exact["encoder_hidden_states"] = [text.float() for text in inputs["encoder_hidden_states"]]
    rounded, mixed = model(dtype=torch.bfloat16, lora_dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    wide = model()
    with torch.no_grad():
        for parts in zip(*(each.parameters() for each in (rounded, mixed, wide)), strict=True):
            for part in parts[1:]:
                part.copy_(parts[0])
    _, expected = gradients(wide, exact, "off")
    _, plain = gradients(rounded, inputs, "off")
    _, fused = gradients(mixed, inputs, "reference")
    errors = []
    for found in (plain, fused):
        differences = [found[name].float() - value for name, value in expected.items() if value is not None]
        errors.append(torch.cat([difference.flatten() for difference in differences]).norm().item())
    assert all(value is None or value.dtype == torch.float32 for value in fused.values())
    assert errors[1] < 1.1 * errors[0]  # fewer roundings on the way; 10 % for their chance


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("another adapter", lambda block: block.requires_grad_(False)),
        ("other weights", lambda block: block.attn.norm_q.weight.requires_grad_(True)),
        ("another adapter", lambda block: block.img_mlp.net[0].proj.weight.requires_grad_(True)),
        ("hook", lambda block: block.attn.register_forward_hook(lambda *_: None)),
        ("another adapter", lambda block: block.attn.to_add_out.register_forward_hook(lambda *_: None)),
    ],
)
def test_takes_the_plain_path_where_it_must(reason, change):
    block = model().transformer_blocks[0]
    image, text, temb = torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32)
    assert why_not_trained(block, image, text, None, temb) is None
    change(block)
    assert reason in why_not_trained(block, image, text, None, temb)


def test_dropout_takes_the_plain_path():
    block = model(lora_dropout=0.1).transformer_blocks[0]
    image, text, temb = torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32)
    assert "another adapter" in why_not_trained(block, image, text, None, temb)
