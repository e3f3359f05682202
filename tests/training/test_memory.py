"""Ways to train in less memory: results stay the same, and plans keep within what there is."""

import gc
import weakref

import pytest
import torch
from offload_cases import transformer, transformer_inputs
from training_data import config, make_trainer

from diffusers_qwenimage.kernels import use_backend
from diffusers_qwenimage.offload import fetched_bytes, plan_stream, streamed
from diffusers_qwenimage.quantize import quantize_
from diffusers_qwenimage.quantize.layers import QuantizedLinear
from diffusers_qwenimage.training.cache import Encoders, TensorCache
from diffusers_qwenimage.training.memory import UNITS, WORKING_UNITS, plan_keep, weights_budget
from diffusers_qwenimage.training.models import find_models
from diffusers_qwenimage.training.modulation import ModulationRows, TabulatedLinear
from diffusers_qwenimage.training.plan import Slot
from diffusers_qwenimage.training.trained import add_adapter_, copy_mapped_, place_base_


@pytest.fixture(autouse=True)
def one_thread():
    """A modulation table differed by one ulp once, in a loaded run of all tests, and never again in 260
    comparisons on 1, 2 and 4 threads. The cause is not known; one thread excludes that products are split in
    two ways."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss_and_gradients(trainer, batch=2):
    loss, _ = trainer.learner.loss([Slot(index=i, counter=10 + i) for i in range(batch)])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.trained.parameters.items()}


def assert_equal(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient is found[1][name] is None or torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("backend", ["off", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modulation_from_a_table_is_bit_equal(workplace, dtype, backend):
    results = []
    for table in (False, True):
        trainer = make_trainer(dtype=dtype, modulation_table=table, batch_size=1)
        assert (trainer.trained.modulation is not None) == table
        with use_backend(backend):
            results.append(loss_and_gradients(trainer, batch=1))
    assert_equal(results[1], results[0])
    layers = [part for part in trainer.trained.modules["dit"].modules() if isinstance(part, TabulatedLinear)]
    assert len(layers) == 4  # two blocks of two streams
    assert not any(parameter.numel() for layer in layers for parameter in layer.parameters())


def test_the_modulation_of_coming_steps_is_computed_once(workplace):
    trainer = make_trainer(batch_size=2, max_steps=20, gradient_accumulation_steps=2)
    table = trainer.trained.modulation
    trainer.learner.prepare_modulation(0, 0)
    rows = table.num_rows
    assert 70 < rows <= 80  # of 80 draws from 1000 values, few are equal
    for step in range(20):
        for micro in range(2):
            trainer.learner.loss(trainer.plan.batch(step, micro, 0))
    assert table.num_rows == rows


def test_forgets_rows_when_there_are_too_many(workplace, monkeypatch):
    monkeypatch.setattr("diffusers_qwenimage.training.modulation.MAX_ROWS", 5)
    table = make_trainer().trained.modulation
    table.prepare(torch.linspace(0.1, 0.4, 4))
    table.prepare(torch.linspace(0.4, 0.8, 5))
    assert table.num_rows == 5
    with table.of(torch.tensor([0.1])):
        assert table.num_rows == 1


@pytest.mark.parametrize(
    "changes", [{"adapter": "dora"}, {"adapter": "lokr", "lora_format": None}, {"trainable_models": "dit"}]
)
def test_no_table_where_the_weights_are_needed(workplace, changes):
    assert make_trainer(**changes).trained.modulation is None


def test_a_table_needs_a_modulation_that_depends_on_the_timestep_alone(workplace):
    transformer = make_trainer(modulation_table=False).trained.modules["dit"]
    transformer.register_to_config(zero_cond_t=True)
    with pytest.raises(ValueError, match="more than the timestep"):
        ModulationRows(transformer, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("backend", ["off", "reference"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_streaming_the_base_is_bit_equal(workplace, monkeypatch, checkpointing, backend):
    changes = {"gradient_checkpointing": checkpointing}
    with use_backend(backend):
        resident = make_trainer(**changes)
        copy_mapped_(resident.trained.modules["dit"])  # products on a CPU depend on how memory is aligned
        expected = loss_and_gradients(resident)
        # The tiny model's weights are a ten-thousandth of what is counted for workspaces.
        for name, value in (("RESERVE", 0), ("WORKING_UNITS", 0), ("TEXT_TOKENS", 0)):
            monkeypatch.setattr(f"diffusers_qwenimage.training.memory.{name}", value)
        trainer = make_trainer(**changes, vram_limit=limit_for(190_000))
        plan = streamed(trainer.trained.modules["dit"])
        assert plan is not None and plan.streamed_bytes > 50_000
        found = loss_and_gradients(trainer)
        assert_equal(found, expected)
        trainer.learner.optimizer.zero_grad()
        assert_equal(loss_and_gradients(trainer), expected)


def test_a_base_in_bf16_is_copied_packed(monkeypatch):
    for name in ("RESERVE", "WORKING_UNITS", "TEXT_TOKENS"):
        monkeypatch.setattr(f"diffusers_qwenimage.training.memory.{name}", 0)
    model = transformer(torch.bfloat16, num_layers=8)
    settings = {"dtype": "bfloat16", "modulation_table": False, "gradient_checkpointing": "full"}
    add_adapter_(model, config(**settings), torch.float32)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    enough = plan_stream(model, None, on_call=(), split=False).smallest_overlapping_bytes
    limit = (1.05 * enough + 4 * trained) / 2**30
    place_base_(model, config(**settings, vram_limit=limit), torch.device("cpu"), [(16, 16)])
    plan = streamed(model)
    assert plan is not None and plan.num_slots > 1
    with torch.no_grad():
        model(**transformer_inputs(torch.bfloat16))
    assert 0 < fetched_bytes(model) < plan.streamed_bytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_text_encoder_that_streams_encodes_the_same_and_goes(workplace, device):
    """On a card of 16 GB the text encoder (16.6 GB in bf16) has to, before the first step."""
    files = find_models(config())
    kinds = {"dtype": torch.float32, "device": torch.device(device)}
    whole = Encoders(files, TensorCache(None), **kinds)
    copy_mapped_(whole.text_encoder)  # products on a CPU depend on how memory is aligned
    budget = plan_stream(whole.text_encoder, 2**30).smallest_overlapping_bytes
    limited = Encoders(files, TensorCache(None), text_budget=budget, **kinds)
    for text in ("one", "a picture, number 2", ""):
        assert torch.equal(limited.embeds(text), whole.embeds(text))
    plan = streamed(limited.text_encoder)
    assert plan.streamed_bytes > 0 and plan.device_bytes <= budget
    weights = [weakref.ref(parameter) for parameter in limited.text_encoder.parameters()]
    limited.release()
    assert not any(reference() is not None for reference in weights)


def limit_for(num_bytes):
    """A limit, in GB, that leaves about so many bytes for the base of the tiny model."""
    trainer = make_trainer()
    trained = sum(p.numel() * p.element_size() for p in trainer.trained.parameters.values())
    return (num_bytes + 4 * trained) / 2**30


@pytest.mark.parametrize("kind", ["fp8", "int8", "fp8-storage"])
def test_base_in_8_bits(workplace, kind):
    """Gradients are close to those over the plain base; the frozen layers of the blocks are quantised."""
    _, expected = loss_and_gradients(make_trainer())
    trainer = make_trainer(base_weights=kind)
    layers = [part for part in trainer.trained.modules["dit"].modules() if isinstance(part, QuantizedLinear)]
    assert len(layers) == 24 and not any(layer.weight.requires_grad for layer in layers)
    for backend in ("off", "reference"):
        trainer.learner.optimizer.zero_grad()
        with use_backend(backend):
            _, found = loss_and_gradients(trainer)
        difference = torch.cat([(found[n] - g).flatten() for n, g in expected.items() if g is not None])
        total = torch.cat([g.flatten() for g in expected.values() if g is not None])
        # 3 mantissa bits (fp8) or 127 levels a row (int8), in weights and inputs of two blocks
        assert difference.norm() / total.norm() < 0.15, backend


def test_quantising_after_the_fused_path_frees_the_old_weights(workplace):
    """What the fused path keeps of a block must not hold weights that are replaced."""
    transformer = make_trainer().trained.modules["dit"]
    block = transformer.transformer_blocks[0]
    with torch.no_grad(), use_backend("reference"):
        transformer(
            hidden_states=torch.zeros(1, 6, 64),
            encoder_hidden_states=torch.zeros(1, 3, 16),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 2, 3)]],
        )
    assert block.plan is not None
    weights = [weakref.ref(block.img_mlp.net[0].proj.weight), weakref.ref(block.attn.to_q.base_layer.weight)]
    quantize_(transformer, "fp8")
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


def test_selective_and_offloaded_checkpointing_change_nothing(workplace):
    with use_backend("reference"):
        expected = loss_and_gradients(make_trainer())
        for mode in ("selective", "full", "auto"):
            assert_equal(loss_and_gradients(make_trainer(gradient_checkpointing=mode)), expected)
        assert_equal(loss_and_gradients(make_trainer(use_gradient_checkpointing_offload=True)), expected)


@pytest.mark.parametrize("mode", ["full", "selective", "offload", "auto"])
def test_the_last_block_is_not_computed_again(mode):
    keep = plan_keep(mode, num_blocks=4, unit_bytes=1000, free_bytes=None)
    assert keep[-1] == "all"
    assert "all" not in keep[:-1]


@pytest.mark.parametrize("free", [0, 25, 34, 60, 88, 89, 100, 200, 2000])
def test_auto_keeps_what_fits(free):
    keep = plan_keep("auto", num_blocks=10, unit_bytes=1000, free_bytes=free * 1000)
    assert keep[-1] == "all"  # what it works with is counted anyhow
    used = sum(UNITS[kept] for kept in keep[:-1]) + UNITS["nothing"]
    if free >= WORKING_UNITS + 10:
        assert used + WORKING_UNITS <= free
    better = {"nothing": 1, "mlp": 1, "attention": 17}
    if free > 1000:
        assert keep == ["all"] * 10
    elif free >= WORKING_UNITS + 10:  # nothing more would fit
        assert all(kept == "all" or used + WORKING_UNITS + better[kept] > free for kept in keep[:-1])


def test_a_limit_below_what_is_trained():
    with pytest.raises(ValueError, match=r"alone take .* GB: lower lora_rank"):
        weights_budget(2**30, mode="full", num_blocks=60, unit=2**25, trained_bytes=2**29)
