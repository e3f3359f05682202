"""What is compiled ahead is what the models call, at the widths of the published model; no GPU is needed."""

import os
import subprocess
import sys

import pytest
import torch
from components import transformers, vaes
from fused_cases import needs_triton

from diffusers_qwenimage.precompile import call_once, compile_autoencoder, compile_transformer, finish
from diffusers_qwenimage.transformer import QwenImageTransformer2DModel
from diffusers_qwenimage.vae import AutoencoderKLQwenImage

# Triton asks a hook before it compiles a variant; one that answers "done already" hears of all of them.
CODE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from diffusers_qwenimage import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers_qwenimage.kernels import norm, rope, set_backend, vae_attention, vae_norm


class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


def heard(key, **_):
    asked.add(key)
    return True


driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = heard
for part in (norm, rope, vae_attention, vae_norm):
    part._run._why_not = "tensors of a CPU have no launcher"
set_backend("triton")
torch.set_grad_enabled(False)
asked = set()
for variant in (
    *norm.variants(3072, torch.bfloat16),
    *rope.variants(24, 128, torch.bfloat16),
    *vae_attention.variants(384, torch.bfloat16),
    *vae_norm.variants([384, 192, 96], torch.bfloat16),
):
    try:
        variant.compile()
    except AttributeError:  # the hook made nothing
        pass
ahead, asked = asked, set()
with torch.device("meta"):
    vae = AutoencoderKLQwenImage().bfloat16().requires_grad_(False)
    model = QwenImageTransformer2DModel(num_layers=1).bfloat16().requires_grad_(False)
vae.to_empty(device="cpu")
vae.decode(torch.zeros(1, 16, 1, 4, 6, dtype=torch.bfloat16))
vae.encode(torch.zeros(1, 3, 1, 24, 40, dtype=torch.bfloat16))
pixels = len(asked)
model.to_empty(device="cpu")
for texts in ((5,), (5, 3)):
    model(
        hidden_states=torch.zeros(len(texts), 12, 64, dtype=torch.bfloat16),
        encoder_hidden_states=[torch.zeros(length, 3584, dtype=torch.bfloat16) for length in texts],
        timestep=torch.full((len(texts),), 0.5, dtype=torch.bfloat16),
        img_shapes=[[(1, 3, 4)]] * len(texts),
        modulation=model.tabulate_modulation(torch.ones(1), dtype=torch.bfloat16).at(0),
    )
print(pixels, len(asked) > pixels, sorted(asked - ahead))
"""


@needs_triton
def test_covers_what_is_called():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "4 True []\n"


def test_nothing_is_compiled_without_a_gpu():
    cpu = torch.device("cpu")
    with torch.device("meta"):
        vae, model = AutoencoderKLQwenImage(base_dim=8), QwenImageTransformer2DModel(num_layers=1)
    assert compile_autoencoder(vae, cpu) == [] and compile_transformer(model, cpu) == []
    assert compile_autoencoder(None, cpu) == [] and compile_transformer(torch.nn.Linear(1, 1), cpu) == []
    finish([])


@pytest.mark.parametrize(
    "kind", [{}, {"use_layer3d_rope": True, "use_additional_t_cond": True}, {"zero_cond_t": True}]
)
def test_one_call_of_every_family(kind):
    model, vae = transformers(**kind)[0], vaes()[0]
    counted = []
    for module in (model.proj_out, vae.decoder.conv_out):
        module.register_forward_hook(lambda *_: counted.append(1))
    call_once(model, vae)
    assert len(counted) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_compiles_on_a_gpu():
    device = torch.device("cuda", 0)
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage().bfloat16()
        model = QwenImageTransformer2DModel(num_layers=1).bfloat16()
    started = [*compile_autoencoder(vae, device), *compile_transformer(model, device)]
    finish(started)
    assert len(started) > 4 and all(future.exception() is None for future in started)
    assert compile_autoencoder(vae, device) == started[:4]  # not again
