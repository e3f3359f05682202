import copy

import pytest
import torch
from components import transformer_inputs, transformers
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import FeedForward
from fused_cases import DEVICE, random, relative
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import nn

import diffusers_qwenimage
from diffusers_qwenimage import plan, projections
from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.module_hooks import is_hooked, is_plain_feed_forward

ROUNDING = 1e-6  # fp32 sums in another order


class Trio(nn.Module):
    def __init__(self, bias=True, sizes=(32, 32, 32)):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(48, size, bias=bias) for size in sizes)

    def parts(self):
        return [self.to_q, self.to_k, self.to_v]


def trio(**options):
    return Trio(**options).to(DEVICE).requires_grad_(False)


def lora(linear, name="default", *, seed=0, **config):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config)
    return LoraLinear(linear, name, config=config, r=4, lora_alpha=8).to(DEVICE).eval()


def test_fused_weights_keep_their_values_and_modules():
    for options in ({}, {"bias": False}, {"sizes": (32, 16, 8)}):
        module = trio(**options)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        parameters = list(module.parameters())
        assert projections.joined([part.weight for part in module.parts()]) is None
        assert projections.fuse_(module) == 1
        whole = projections.joined([part.weight for part in module.parts()])
        assert torch.equal(whole, torch.cat([part.weight for part in module.parts()]))
        assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key])
        pointer = module.to_q.weight.data_ptr()
        assert projections.fuse_(module) == 1 and module.to_q.weight.data_ptr() == pointer


def test_loading_into_fused_weights_and_moving_them():
    module, other = trio(), trio()
    projections.fuse_(module)
    other.load_state_dict({key: value + 1 for key, value in other.state_dict().items()})
    module.load_state_dict(other.state_dict())
    whole = projections.joined([part.weight for part in module.parts()])
    assert torch.equal(whole, torch.cat([part.weight for part in other.parts()]))
    for moved in (copy.deepcopy(module), module.to(torch.float64)):
        x = random(3, 48, dtype=moved.to_q.weight.dtype)
        out = x.new_empty(3, 96)
        with torch.no_grad():
            projections.project_three_into(out, x, moved.parts())
            assert relative(out, torch.cat([part(x) for part in moved.parts()], dim=1)) < ROUNDING


def test_what_is_not_fused():
    trained = trio()
    trained.to_k.weight.requires_grad_()
    mixed = trio()
    mixed.to_v.half()
    one_bias = trio()
    one_bias.to_q.bias = None
    other_layer = trio()
    other_layer.to_q = nn.Identity()
    for module in (trained, mixed, one_bias, other_layer, Trio().to("meta")):
        pointers = [p.data_ptr() for p in module.parameters()]
        assert projections.fuse_(module) == 0
        assert [p.data_ptr() for p in module.parameters()] == pointers


def test_weights_that_want_gradients_move_only_for_inference():
    module = Trio().to(DEVICE).eval()
    assert projections.fuse_(module) == 0  # gradients are on
    with torch.no_grad():
        for spoil in (in_training, with_a_gradient, in_one_buffer):
            other = copy.deepcopy(module)
            spoil(other)
            pointers = [p.data_ptr() for p in other.parameters()]
            assert projections.fuse_(other) == 0
            assert [p.data_ptr() for p in other.parameters()] == pointers
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        assert projections.fuse_(module) == 1
    assert projections.joined([part.weight for part in module.parts()]) is not None
    before = module.to_k.weight.detach().clone()
    module.to_k(random(5, 48)).sum().backward()
    optimizer.step()  # of weights that were moved after it was made
    assert torch.equal(module.to_k.weight, before - module.to_k.weight.grad)
    assert projections.fuse_(module) == 1  # it is so already


def in_training(module):
    module.train()


def with_a_gradient(module):
    module.to_q.bias.grad = torch.zeros_like(module.to_q.bias)


def in_one_buffer(module):
    flat = torch.cat([p.flatten() for p in module.parameters()])
    for parameter, part in zip(
        module.parameters(), flat.split([p.numel() for p in module.parameters()]), strict=True
    ):
        parameter.data = part.view_as(parameter)


def test_neighbours_of_different_storages_are_not_joined():
    storage = torch.arange(8.0)
    a, b = storage[:4].view(2, 2), storage[4:].view(2, 2)
    assert torch.equal(projections.joined([a, b]), storage.view(4, 2))
    assert projections.joined([b, a]) is None
    assert projections.joined([a, b.t()]) is None
    short = torch.tensor([]).set_(a.clone().untyped_storage())
    assert projections.joined([short.view(2, 2), b]) is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_three_projections(bias, fused):
    module = trio(bias=bias)
    if fused:
        projections.fuse_(module)
    x, out = random(5, 48), torch.full((5, 96), float("nan"), device=DEVICE)
    with torch.no_grad():
        projections.project_three_into(out, x, module.parts())
        assert relative(out, torch.cat([part(x) for part in module.parts()], dim=1)) < ROUNDING


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def hooked():
    linear = nn.Linear(48, 32).to(DEVICE)
    HookRegistry.check_if_exists_or_initialize(linear).register_hook(Doubled(), "doubled")
    return linear


def torch_hooked():
    linear = nn.Linear(48, 32).to(DEVICE)
    linear.register_forward_hook(lambda module, inputs, output: output + 1)
    return linear


def disabled():
    layer = lora(nn.Linear(48, 32))
    layer.enable_adapters(False)
    return layer


def merged(*, enabled=True):
    layer = lora(nn.Linear(48, 32))
    layer.merge()
    layer.enable_adapters(enabled)
    return layer


def two_adapters():
    layer = lora(nn.Linear(48, 32))
    layer.update_layer(
        "second", 6, lora_alpha=3, config=LoraConfig(r=6, lora_alpha=3, init_lora_weights=False)
    )
    layer.set_adapter(["default", "second"])
    layer.scale_layer(0.5)
    return layer.to(DEVICE).eval()


def with_dropout():
    layer = lora(nn.Linear(48, 32), lora_dropout=0.5)
    return layer


def other_dtype():
    layer = lora(nn.Linear(48, 32))
    layer.lora_A.double(), layer.lora_B.double()
    return layer


# name -> (module, whether it is taken apart)
LINEARS = {
    "plain": (lambda: nn.Linear(48, 32).to(DEVICE), True),
    "without bias": (lambda: nn.Linear(48, 32, bias=False).to(DEVICE), True),
    "diffusers hook": (hooked, False),
    "torch hook": (torch_hooked, False),
    "another module": (lambda: nn.Sequential(nn.Linear(48, 32), nn.ReLU()).to(DEVICE), False),
    "lora": (lambda: lora(nn.Linear(48, 32)), True),
    "lora on a hooked layer": (lambda: lora(hooked()), False),
    "two adapters": (two_adapters, True),
    "disabled": (disabled, True),
    "merged": (merged, True),
    "merged and disabled": (lambda: merged(enabled=False), False),
    "dora": (lambda: lora(nn.Linear(48, 32), use_dora=True), False),
    "bias in the adapter": (lambda: lora(nn.Linear(48, 32), lora_bias=True), False),
    "idle dropout": (with_dropout, True),
    "active dropout": (lambda: with_dropout().train(), False),
    "adapter of another type": (other_dtype, False),
}


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("name", LINEARS)
def test_every_kind_of_linear(name):
    build, opened = LINEARS[name]
    torch.manual_seed(0)
    module, x = build().requires_grad_(False), random(5, 48)
    assert (projections.open_linear(module, x) is not None) == opened
    with torch.no_grad():
        torch.manual_seed(1)  # for dropout
        got = projections.project(x, module)
        torch.manual_seed(1)
        assert relative(got, module(x[None])[0]) < ROUNDING
        if name == "active dropout":
            return
        three = trio()
        three.to_k = module
        projections.fuse_(three)
        out = torch.full((5, 96), float("nan"), device=DEVICE)
        projections.project_three_into(out, x, three.parts())
        assert relative(out, torch.cat([part(x[None])[0] for part in three.parts()], dim=1)) < ROUNDING


def test_adapters_on_fused_weights_stay_one_product():
    module = trio()
    projections.fuse_(module)
    module.to_q, module.to_v = lora(module.to_q, seed=1), lora(module.to_v, seed=2)
    x, out = random(5, 48), torch.empty(5, 96, device=DEVICE)
    layers = [projections.open_linear(part, x) for part in module.parts()]
    assert projections._base_into(out, x, layers)
    assert projections.fuse_(module.requires_grad_(False)) == 1
    with torch.no_grad():
        projections.project_three_into(out, x, module.parts())
        assert relative(out, torch.cat([part(x) for part in module.parts()], dim=1)) < ROUNDING


def test_weights_of_another_type_are_left_to_the_module():
    x = random(5, 48, dtype=torch.bfloat16)
    assert projections.open_linear(nn.Linear(48, 32).to(DEVICE), x) is None


def test_feed_forward():
    torch.manual_seed(0)
    module, x = FeedForward(48, activation_fn="gelu-approximate").to(DEVICE).eval(), random(5, 48)

    def mlp():
        return plan.Mlp(module, x.device)(x, x.dtype, triton=False)

    assert is_plain_feed_forward(module)
    with torch.no_grad():
        assert relative(mlp(), module(x)) < ROUNDING
        module.net[0].proj = lora(module.net[0].proj)
        module.net[2] = lora(module.net[2])
        assert is_plain_feed_forward(module)
        assert relative(mlp(), module(x)) < ROUNDING
    for other in (
        FeedForward(48, activation_fn="gelu"),
        FeedForward(48, activation_fn="geglu"),
        FeedForward(48, activation_fn="gelu-approximate", final_dropout=True),
        FeedForward(48, activation_fn="gelu-approximate", dropout=0.1).train(),
        nn.Linear(48, 48),
    ):
        assert not is_plain_feed_forward(other)


def test_hooks_that_were_removed_are_no_hooks():
    linear = hooked()
    assert is_hooked(linear)
    HookRegistry.check_if_exists_or_initialize(linear).remove_hook("doubled")
    assert not is_hooked(linear)


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_fused_models_save_the_same_files(tmp_path, max_shard_size):
    ours, _ = transformers()
    ours.requires_grad_(False)
    ours.save_pretrained(tmp_path / "before", max_shard_size=max_shard_size)
    assert projections.fuse_(ours) == 4
    ours.save_pretrained(tmp_path / "after", max_shard_size=max_shard_size)

    def weights(folder):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        return {key: value for file in files for key, value in load_file(file).items()}

    before, after = weights("before"), weights("after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    size = sum(file.stat().st_size for file in (tmp_path / "after").glob("*.safetensors"))
    assert size < 1.05 * sum(file.stat().st_size for file in (tmp_path / "before").glob("*.safetensors"))
    loaded = diffusers_qwenimage.QwenImageTransformer2DModel.from_pretrained(tmp_path / "after")
    inputs = transformer_inputs([(1, 4, 6)])
    with torch.no_grad(), use_backend("off"):
        assert relative(loaded(**inputs).sample, ours(**inputs).sample) < ROUNDING
