"""The fused path of the transformer against its plain path, with reference operations and with Triton's."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from components import FAMILY, TRANSFORMER, random, transformer_inputs, transformers
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, TaylorSeerCacheConfig
from fused_cases import DEVICE, needs_triton, relative
from peft import LoraConfig

import diffusers_qwenimage
from diffusers_qwenimage import fused, kernels, projections

ROUNDING = 3e-6  # relative, fp32: sums in another order
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
TARGETS = [
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
    "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
]  # fmt: skip


def model(dtype=torch.float32, **config):
    return transformers(**config)[0].to(DEVICE, dtype).requires_grad_(False)


def moved(inputs, dtype=torch.float32):
    return {
        key: value.to(DEVICE, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else [text.to(DEVICE, dtype) for text in value]
        if key == "encoder_hidden_states"
        else value
        for key, value in inputs.items()
    }


def both(ours, inputs, backend, *, taken=True):
    """Outputs of the plain and of the fused path; checks which path was taken."""
    with torch.no_grad():
        with kernels.use_backend("off"):
            plain = ours(**inputs).sample
        with kernels.use_backend(backend), watched() as calls:
            got = ours(**inputs).sample
    assert bool(calls) == taken
    return plain, got


class watched:
    """Counts the calls of `fused_block`."""

    def __enter__(self):
        self.original, calls = fused.fused_block, []

        def counted(*args, **kwargs):
            calls.append(1)
            return self.original(*args, **kwargs)

        fused.fused_block = counted
        return calls

    def __exit__(self, *error):
        fused.fused_block = self.original


def batches(shapes, kind, *, all_cases=True):
    """Inputs: one sample, several, packed texts of unequal and of equal lengths, masked."""
    one, two = (transformer_inputs(shapes, batch, kind=kind) for batch in (1, 2))
    texts = [random(length, 16, seed=length) for length in (3, 9)]
    yield "packed", {**two, "encoder_hidden_states": texts}
    if not all_cases:  # the interpreter is slow
        return
    yield "one", one
    yield "one token of text", transformer_inputs(shapes, 1, 1, kind=kind)
    yield "two", two
    for lengths in ((5, 5), (1, 1)):
        texts = [random(length, 16, seed=length) for length in lengths]
        yield f"packed {lengths}", {**two, "encoder_hidden_states": texts}
    yield "masked", {**two, "encoder_hidden_states_mask": MASK}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILY)
def test_family(name, backend):
    config, shapes = FAMILY[name]
    ours = model(**config)
    all_cases = backend == "reference" or DEVICE == "cuda"
    if not all_cases:
        shapes = [(frames, rows // 2, columns // 2) for frames, rows, columns in shapes]
    for case, inputs in batches(shapes, "use_additional_t_cond" in config, all_cases=all_cases):
        plain, got = both(ours, moved(inputs), backend)
        assert relative(got, plain) < ROUNDING, case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_close_to_the_truth(backend, dtype):
    ours = model(zero_cond_t=True)
    inputs = moved(transformer_inputs([(1, 2, 3), (1, 2, 2)], 2))
    with torch.no_grad(), kernels.use_backend("off"):
        exact = ours(**inputs).sample
    plain, got = both(ours.to(dtype), moved(inputs, dtype), backend)
    assert got.dtype == dtype
    # The interpreter cuts off to bf16 where the GPU and torch round: twice the error.
    slack = 2.5 if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16 else 1.1
    assert relative(got, exact) <= slack * relative(plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads, dim, axes", [(1, 8, (4, 2, 2)), (5, 24, (8, 8, 8)), (2, 64, (16, 24, 24))])
def test_other_sizes(heads, dim, axes, backend):
    sizes = {"num_attention_heads": heads, "attention_head_dim": dim, "axes_dims_rope": axes}
    torch.manual_seed(0)
    ours = diffusers_qwenimage.QwenImageTransformer2DModel(**{**TRANSFORMER, **sizes}).to(DEVICE).eval()
    for shape in ((1, 1, 1), (1, 3, 5)):
        plain, got = both(ours, moved(transformer_inputs([shape], 1, 3)), backend)
        assert relative(got, plain) < ROUNDING


def test_control_residuals_and_modulation_table():
    ours = model(zero_cond_t=True)
    inputs = moved(transformer_inputs(FAMILY["edit-2511"][1], 2))
    inputs["timestep"] = inputs["timestep"][:1].expand(2)
    length = inputs["hidden_states"].shape[1]
    residuals = [random(2, length, 48, seed=seed).to(DEVICE) for seed in range(2)]
    plain, got = both(ours, {**inputs, "controlnet_block_samples": residuals}, "reference")
    assert relative(got, plain) < ROUNDING
    table = ours.tabulate_modulation(inputs["timestep"][:1], dtype=torch.float32)
    plain, got = both(ours, {**inputs, "modulation": table.at(0)}, "reference")
    assert relative(got, plain) < ROUNDING


def add_lora(ours, names=("default",), **config):
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        ours.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config), name)
    ours.set_adapters(list(names))
    return ours.to(DEVICE).eval().requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_on_the_default_modules(backend):
    ours = add_lora(model(), target_modules=TARGETS)
    inputs = moved(transformer_inputs([(1, 2, 3)], 2))
    for kwargs in ({}, {"attention_kwargs": {"scale": 0.3}}):
        plain, got = both(ours, {**inputs, **kwargs}, backend)
        assert relative(got, plain) < ROUNDING
    projections.fuse_(ours)
    attn = ours.transformer_blocks[0].attn
    assert (
        projections.joined([part.base_layer.weight for part in (attn.to_q, attn.to_k, attn.to_v)]) is not None
    )
    ours.disable_adapters()
    without = both(ours, inputs, backend)
    assert relative(without[1], without[0]) < ROUNDING and relative(without[0], plain) > 1e-3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # there are two adapters
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["to_q", "to_out.0", "img_mlp.net.2"], "use_dora": True},
        {"target_modules": ["img_mlp.net.0.proj", "add_k_proj"], "lora_bias": True},
        {"target_modules": ["to_v", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"], "lora_dropout": 0.5},
    ],
)
def test_other_adapters(config):
    ours = add_lora(model(), ("first", "second"), **config)
    plain, got = both(ours, moved(transformer_inputs([(1, 4, 6)])), "reference")
    assert relative(got, plain) < ROUNDING


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e9),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ],
)
def test_step_caches(config):
    outputs = []
    for backend in ("off", "reference"):
        ours = model()
        ours.enable_cache(copy.deepcopy(config))
        with torch.no_grad(), ours.cache_context("cond"), kernels.use_backend(backend):
            steps = [moved(transformer_inputs([(1, 4, 6)], seed=step)) for step in range(4)]
            outputs.append(torch.cat([ours(**inputs).sample for inputs in steps]))
    assert relative(outputs[1], outputs[0]) < ROUNDING


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("where", ["attn.to_q", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.0.proj"])
def test_hooks_on_linears_are_called(where):
    ours = model()
    hooked = ours.transformer_blocks[0].get_submodule(where)
    HookRegistry.check_if_exists_or_initialize(hooked).register_hook(Doubled(), "doubled")
    plain, got = both(ours, moved(transformer_inputs([(1, 4, 6)])), "reference")
    assert relative(got, plain) < ROUNDING


@pytest.mark.parametrize(
    "where", ["attn", "img_norm1", "attn.norm_k", "img_mlp", "txt_mlp.net.1", "attn.to_out.1"]
)
def test_hooks_elsewhere_take_the_plain_path(where):
    ours = model()
    calls = []
    for block in ours.transformer_blocks:
        block.get_submodule(where).register_forward_hook(lambda *args: calls.append(1))
    plain, got = both(ours, moved(transformer_inputs([(1, 4, 6)])), "reference", taken=False)
    assert torch.equal(plain, got) and len(calls) == 4


def test_attention_backends_and_processors():
    ours = model()
    inputs = moved(transformer_inputs([(1, 4, 6)]))
    ours.set_attention_backend("_native_math")
    plain, got = both(ours, inputs, "reference")
    assert relative(got, plain) < ROUNDING
    ours.reset_attention_backend()

    class Changed(type(ours.transformer_blocks[0].attn.processor)):
        pass

    for block in ours.transformer_blocks:
        block.attn.processor = Changed()
    both(ours, inputs, "reference", taken=False)


def test_gradients_take_the_plain_path():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    with kernels.use_backend("reference"), watched() as calls:
        ours(**inputs)  # nothing to differentiate
        assert len(calls) == 2
        ours(**{**inputs, "hidden_states": inputs["hidden_states"].requires_grad_()}).sample.sum().backward()
        ours.requires_grad_(True)
        ours(**inputs).sample.sum().backward()
        ours.enable_gradient_checkpointing()
        ours.train()
        ours(**inputs).sample.sum().backward()
        assert len(calls) == 2
        attn = ours.transformer_blocks[0].attn
        attn.is_laid_out = False
        with torch.no_grad():
            plain, got = both(ours, inputs, "reference")
        # trained weights stay where the optimiser put them
        assert relative(got, plain) < ROUNDING


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_just_loaded_are_one_product(tmp_path, mode):
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    ours.save_pretrained(tmp_path)
    loaded = type(ours).from_pretrained(tmp_path).to(DEVICE)
    attn = loaded.transformer_blocks[0].attn
    with mode():
        assert relative(*both(loaded, inputs, "reference")) < ROUNDING
    for names in projections.GROUPS:
        weights = [getattr(attn, name).weight for name in names]
        assert all(weight.requires_grad for weight in weights)
        assert projections.joined(weights) is not None
    loaded(**inputs).sample.sum().backward()  # can still be trained
    assert attn.to_q.weight.grad is not None


def test_autocast_and_compilation_take_the_plain_path():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    with torch.autocast(DEVICE, torch.bfloat16):
        both(ours, inputs, "reference", taken=False)
    ours.compile_repeated_blocks(fullgraph=True, backend="eager")
    plain, got = both(ours, inputs, "reference", taken=False)
    assert torch.equal(plain, got)
    torch._dynamo.reset()


def test_group_offload_and_layerwise_casting():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    with torch.no_grad(), kernels.use_backend("off"):
        expected = ours(**inputs).sample
    ours.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    plain, got = both(ours, inputs, "reference")
    assert relative(got, plain) < ROUNDING and relative(got, expected) < 0.2
    for kind in ("block_level", "leaf_level"):
        ours = model()
        ours.enable_group_offload(
            torch.device(DEVICE), offload_type=kind, num_blocks_per_group=1 if kind == "block_level" else None
        )
        with torch.no_grad(), kernels.use_backend("reference"):
            assert relative(ours(**inputs).sample, expected) < ROUNDING


def test_moving_and_deepcopy_after_a_fused_call():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    plain, _ = both(ours, inputs, "reference")
    attn = ours.transformer_blocks[0].attn
    assert attn.is_laid_out
    assert projections.joined([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]) is not None
    _, got = both(copy.deepcopy(ours), inputs, "reference")
    assert relative(got, plain) < ROUNDING
    ours.double()
    assert not attn.is_laid_out
    both(ours, moved(inputs, torch.float64), "reference", taken=False)
    _, got = both(ours.float(), inputs, "reference")
    assert attn.is_laid_out and relative(got, plain) < ROUNDING


def test_a_model_is_freed_without_a_search_for_cycles():
    ours = model()
    both(ours, moved(transformer_inputs([(1, 4, 6)])), "reference")
    alive = weakref.ref(ours.transformer_blocks[0])
    gc.disable()
    del ours
    assert alive() is None
    gc.enable()


def test_plans_are_made_anew_only_when_something_changed():
    ours, inputs = model(), moved(transformer_inputs([(1, 4, 6)]))
    block = ours.transformer_blocks[0]

    def plan_now():
        plain, got = both(ours, inputs, "reference")
        assert relative(got, plain) < ROUNDING
        return block.plan

    first = plan_now()
    assert (
        plan_now() is first
        and copy.deepcopy(block).plan is None
        and pickle.loads(pickle.dumps(first)) is None
    )
    block.attn.to_q.weight.data = block.attn.to_q.weight.data.clone() * 2  # read anew at every call
    block.attn.add_q_proj.bias = torch.nn.Parameter(2 * block.attn.add_q_proj.bias, requires_grad=False)
    assert plan_now() is first
    changes = [
        lambda: setattr(block.attn, "to_k", copy.deepcopy(block.attn.to_k)),
        lambda: block.attn.to_v.register_forward_hook(lambda *args: 2 * args[-1]),
        lambda: setattr(block.img_mlp.net[2], "forward", lambda x: x[..., :48]),
        lambda: setattr(block.attn.processor, "_attention_backend", "_native_math"),
    ]
    for change in changes:
        change()
        second = plan_now()
        assert second is not first and plan_now() is second
        first = second


def test_a_model_without_a_gpu_imports_no_kernels():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch; from components import *\n"
        "ours, _ = transformers()\n"
        "with torch.no_grad(): ours(**transformer_inputs([(1, 4, 6)]))\n"
        "print([m for m in ('fused', 'kernels.launch') if f'diffusers_qwenimage.{m}' in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_backend_is_chosen_with_a_reason():
    chosen = kernels.backend(torch.device("cpu"))
    assert chosen.name == "off" and "cpu" in chosen.reason
    with kernels.use_backend("auto"):
        assert kernels.backend(torch.device("cpu")) == chosen
    with kernels.use_backend("reference"):
        assert kernels.backend(torch.device("cpu")).reason == "set by hand"
    assert kernels.backend(torch.device("cpu")) == chosen
    with pytest.raises(ValueError, match="no backend 'fast'. Choose one of auto, triton, reference, off"):
        kernels.set_backend("fast")


def test_compiler_that_triton_needs_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not kernels.triton_can_build()
    compiler = tmp_path / "clang"
    compiler.write_text("")
    compiler.chmod(0o755)
    assert kernels.triton_can_build()
    compiler.unlink()
    monkeypatch.setenv("CC", "/opt/cc")
    assert kernels.triton_can_build()


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        kernels.set_backend("triton")
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from diffusers_qwenimage.kernels import norm, rope, matmul\n"
        "x, row = torch.ones(2, 4), torch.ones(1, 4)\n"
        "print(norm.norm_modulate(x, row, row).sum().item(), hasattr(norm, 'triton'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["8.0", "False"]
