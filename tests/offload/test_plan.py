"""What stays and what streams: within the budget, evenly, and refused where it cannot be."""

import components
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from offload_cases import limit_of, run, stock_transformer, text_encoder, transformer, transformer_inputs
from torch import nn

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.checkpoint import empty_module
from diffusers_qwenimage.offload import find_blocks, placing, plan_stream, state, stream
from diffusers_qwenimage.quantize import quantize_

GB = 10**9


@pytest.fixture(scope="module")
def published():
    """The published model's sizes, on the meta device."""
    return empty_module(QwenImageTransformer2DModel).to(torch.bfloat16)


def test_sizes_of_the_published_model(published):
    plan = plan_stream(published, 12 * GB)
    assert plan.on_call_bytes == 60 * 2 * (3072 * 18432 + 18432) * 2  # modulation: 13.6 GB
    assert plan.device_bytes <= 12 * GB
    # All of it is used, but for less than the largest group of tensors.
    assert 12 * GB - plan.device_bytes < 3072 * 12288 * 2
    assert plan.num_slots == 3
    assert plan.smallest_bytes < plan.smallest_overlapping_bytes < GB
    total = sum(parameter.nbytes for parameter in published.parameters())
    kept = plan.resident_bytes + plan.streamed_bytes + plan.on_call_bytes
    assert total <= kept < total + 60 * 3 * 2**20  # slabs are rounded up


def test_blocks_share_evenly(published):
    for budget in (2 * GB, 8 * GB, 16 * GB, 24 * GB):
        sizes = [block.streamed_bytes for block in plan_stream(published, budget).blocks]
        assert max(sizes) - min(sizes) <= 3072 * 12288 * 2  # the largest group of tensors
        halves = sum(sizes[:30]), sum(sizes[30:])
        assert abs(halves[0] - halves[1]) <= max(sizes)


def test_more_budget_streams_less(published):
    budgets = [GB, 2 * GB, 4 * GB, 8 * GB, 12 * GB, 16 * GB, 20 * GB, 24 * GB, 27 * GB, 40 * GB, 42 * GB]
    plans = [plan_stream(published, budget) for budget in budgets]
    streamed = [plan.streamed_bytes for plan in plans]
    assert streamed == sorted(streamed, reverse=True) and streamed[-1] == 0
    assert all(plan.device_bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert plans[-1].on_call_bytes == 0  # everything fits, modulation too


def test_expected_time(published):
    plan = plan_stream(published, 2 * GB)
    link = 54.9e9
    assert plan.seconds_per_pass(compute=0.1, link=link) == plan.streamed_bytes / link
    assert plan.seconds_per_pass(compute=9.0, link=link) == 9.0
    one = plan_stream(published, plan.smallest_bytes)
    assert one.num_slots == 1 and one.is_split
    assert one.seconds_per_pass(compute=0.1, link=link) == 0.1 + one.streamed_bytes / link


def test_8_bit_halves_what_streams(published):
    eight = empty_module(QwenImageTransformer2DModel).to(torch.bfloat16)
    quantize_(eight, "fp8")
    plan, before = plan_stream(eight, GB, split=False), plan_stream(published, GB, split=False)
    assert 0.49 < plan.streamed_bytes / before.streamed_bytes < 0.51
    assert plan.smallest_bytes < 0.65 * before.smallest_bytes


def test_too_little_is_refused_with_the_least_that_works(published):
    least = plan_stream(published, None).smallest_bytes
    with pytest.raises(ValueError, match=f"at least {least:,} bytes"):
        plan_stream(published, least - 1)
    assert plan_stream(published, least).device_bytes == least
    for split, num_slots in ((False, 2), (None, 3), (True, 3)):
        enough = plan_stream(published, None, split=split).smallest_overlapping_bytes
        assert plan_stream(published, enough, split=split).num_slots == num_slots
        assert plan_stream(published, enough - 1, split=split).num_slots == num_slots - 1


def test_three_parts_of_blocks_take_the_memory_of_one(published):
    blocks, parts = (plan_stream(published, None, split=split) for split in (False, True))
    assert plan_stream(published, blocks.smallest_bytes).is_split
    assert 2.9 * parts.smallest_bytes < parts.smallest_overlapping_bytes + 2 * parts.resident_bytes
    assert parts.smallest_overlapping_bytes < blocks.smallest_bytes
    whole = plan_stream(published, blocks.smallest_overlapping_bytes)
    assert not whole.is_split and whole.num_slots == 2
    split = plan_stream(published, blocks.smallest_overlapping_bytes - 1)
    assert split.is_split and split.num_slots == 3
    # What is left of the budget is used: parts stay resident.
    assert blocks.smallest_overlapping_bytes - split.device_bytes < 3072 * 12288 * 2
    sizes = {block.streamed_bytes for block in plan_stream(published, parts.smallest_bytes).blocks}
    assert max(sizes) - min(sizes) < 2**20  # attention and MLPs are alike


def test_arguments_are_checked(published):
    with pytest.raises(ValueError, match="vram_limit is -1"):
        plan_stream(published, -1)
    with pytest.raises(ValueError, match="no source 'disk'"):
        plan_stream(published, GB, source="disk")
    with pytest.raises(ValueError, match="num_slots is 0"):
        plan_stream(published, GB, num_slots=0)
    with pytest.raises(ValueError, match="no submodule 'blocks'"):
        plan_stream(published, GB, blocks=["blocks"])
    with pytest.raises(ValueError, match="no submodule 'img_modulation'"):
        plan_stream(published, GB, on_call=["img_modulation"])
    with pytest.raises(ValueError, match="no list of blocks"):
        plan_stream(nn.Linear(3, 3), GB)
    with pytest.raises(ValueError, match="no weights"):
        plan_stream(nn.ModuleList([nn.ModuleList([nn.SiLU()])]), GB, blocks=["0"])


def test_blocks_are_found():
    assert find_blocks(transformer()) == ["transformer_blocks"]
    assert find_blocks(stock_transformer()) == ["transformer_blocks"]
    assert find_blocks(text_encoder()) == ["model.visual.blocks", "model.language_model.layers"]


def test_blocks_by_name():
    model, inputs = transformer(), transformer_inputs()
    expected = run(model, inputs)
    names = ["transformer_blocks.1", "transformer_blocks.3"]
    smallest = plan_stream(model, None, blocks=names, split=False).smallest_bytes
    plan = stream(model, device="cpu", vram_limit=smallest, blocks=names, split=False)
    assert [block.name for block in plan.blocks] == names
    assert torch.equal(run(model, inputs), expected)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.blocks[3].weight = self.blocks[0].weight
            self.out = nn.Linear(8, 8)
            self.out.weight = self.blocks[1].weight

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    model, x = Tied(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        smallest = plan_stream(model, None).smallest_bytes
        try:
            stream(model, device="cpu", vram_limit=smallest)
        except ValueError as error:
            assert "shared" in str(error)
            return
        assert torch.equal(model(x), expected)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    share=st.floats(0, 1.05),
    num_slots=st.sampled_from([None, 1, 2, 3]),
    split=st.sampled_from([None, False, True]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from([None, "fp8", "fp8-storage"]),
    num_layers=st.integers(2, 7),
    heads=st.integers(1, 3),
    on_call=st.sampled_from([None, (), ("img_mod",), ("txt_mlp",)]),
)
def test_random_plans_keep_to_their_budget(share, num_slots, dtype, kind, num_layers, heads, on_call, split):
    """What is really allocated, for 100 models and budgets."""
    config = {**components.TRANSFORMER, "num_layers": num_layers, "num_attention_heads": heads}
    model = QwenImageTransformer2DModel(**config).to(dtype).requires_grad_(False)
    if kind is not None:
        quantize_(model, kind)
    limit = limit_of(model, share, on_call=on_call, split=split)
    taken = []

    def slab(num_bytes, device):
        taken.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "device_slab", slab)
        patch.setattr(placing, "device_slab", slab)
        try:
            plan = stream(
                model, device="cpu", vram_limit=limit, num_slots=num_slots, on_call=on_call, split=split
            )
        except ValueError:
            assert (num_slots or 1) > 1  # the smallest budget has one slot
            return
    assert sum(taken) <= limit
    assert sum(taken) == plan.device_bytes
