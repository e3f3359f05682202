"""The transformer of transformer.py with other weights: in 8 bits, with a LoRA, without its modulation."""

import statistics
import time
from pathlib import Path

import diffusers
import torch
from arms import GIB, Arms, Note, allocated, compare, first, relative, synchronize, timed
from peft import LoraConfig
from torch import Tensor
from training_peers import stock_of
from transformer_model import inputs_of, over_the_same, profile, recorded, with_table

from diffusers_qwenimage import QwenImageTransformer2DModel
from diffusers_qwenimage.denoise import DenoiseInputs, denoise
from diffusers_qwenimage.projections import fuse_
from diffusers_qwenimage.quantize import quantize_
from diffusers_qwenimage.schedule import even_sigmas, set_timesteps

LORA_MODULES = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
)
KINDS = ("fp8", "int8", "fp8-storage")
# Random weights, 60 blocks: what a kind may be away from bf16. Above it something is wrong, not coarse.
WORST = {"fp8": 0.15, "int8": 0.15, "fp8-storage": 0.12}


@torch.no_grad()
def compare_quantized(
    ours: QwenImageTransformer2DModel,
    kind: str,
    sizes: list[int],
    repeats: int,
    note: Note,
    profile_to: Path | None,
) -> None:
    """The block linears in 8 bits beside bf16; all that is not quantised is shared."""
    other, before = over_the_same(ours), allocated()
    seconds, layers = first(lambda: quantize_(other, kind))
    fuse_(other)
    note(f"{kind}: quantising {len(layers)} layers", seconds, "s")
    note(f"{kind}: weights of these layers", allocated() - before, "GiB")
    for side in sizes:
        one = inputs_of(ours, side)
        difference = relative(other(**one)[0], ours(**one)[0])
        note(f"{side}x{side} forward, {kind} against bf16, relative difference", difference, "")
        if not difference < WORST[kind]:
            raise SystemExit(f"{kind} is {difference:.3f} from bf16: wrong, not measured further.")
        tabulated = with_table(other, one)
        arms: Arms = {f"bf16, in turn with {kind}": with_table(ours, one), kind: tabulated}
        recording = recorded(tabulated)
        if recording is not None:
            arms[f"{kind}, CUDA graph"] = recording[0].replay
        compare(arms, repeats, note, f"{side}x{side} forward, ours, modulation tabulated")
        del arms, recording
        measure_launch(other, side, lambda case, *rest: note(f"{case}, {kind}", *rest))
    if profile_to:
        profile(other, max(sizes), profile_to.with_stem(f"{profile_to.stem}-{kind}"))


@torch.no_grad()
def measure_launch(ours: torch.nn.Module, side: int, note: Note) -> None:
    """Time until the call returns, with an idle GPU: what the processor needs for a forward."""
    one = inputs_of(ours, side)
    times = []
    for _ in range(7):
        synchronize()
        start = time.perf_counter()
        ours(**one)
        times.append(1e3 * (time.perf_counter() - start))
    note(f"{side}x{side} forward, ours, until the call returns", statistics.median(times), "ms")


@torch.no_grad()
def compare_lora(ours: QwenImageTransformer2DModel, side: int, repeats: int, note: Note) -> None:
    """One adapter of rank 32 on the twelve modules that LoRAs of this model usually have."""
    one = inputs_of(ours, side)
    adapted, stock = over_the_same(ours), stock_of(ours).eval()
    for model in (adapted, stock):
        model.add_adapter(LoraConfig(r=32, lora_alpha=32, target_modules=list(LORA_MODULES)))
    generator = torch.Generator(ours.device).manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            values = torch.empty_like(parameter, dtype=torch.bfloat16)
            parameter.data = values.normal_(0, 0.01, generator=generator)
    stock.load_state_dict(adapted.state_dict(), assign=True)
    for model in (adapted, stock):
        model.eval().requires_grad_(False)
    difference = relative(adapted(**one)[0], stock(**one)[0])
    note(f"{side}x{side} forward with a LoRA, ours against diffusers, relative difference", difference, "")
    arms: Arms = {
        "diffusers + PEFT": lambda: stock(**one),
        "ours": lambda: adapted(**one),
        "ours, modulation tabulated": with_table(adapted, one),
        "ours without the LoRA, modulation tabulated": with_table(ours, one),
    }
    medians = compare(arms, repeats, note, f"{side}x{side} forward with a LoRA of rank 32 on 12 modules")
    kept = medians["ours without the LoRA, modulation tabulated"] / medians["ours, modulation tabulated"]
    note(f"{side}x{side} forward, ours, speed kept with the LoRA, modulation tabulated", kept, "")


@torch.no_grad()
def measure_modulation(
    ours: QwenImageTransformer2DModel, side: int, note: Note, *, num_tabulated: int = 50
) -> None:
    """Denoise four steps with the modulation weights resident, and with them in host memory."""
    grid = side // 16
    text = inputs_of(ours, side)["encoder_hidden_states"]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)

    def run() -> tuple[Tensor, float]:
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        timesteps = set_timesteps(scheduler, even_sigmas(4), num_tokens=grid * grid, device=ours.device)
        inputs = DenoiseInputs(
            latents=inputs_of(ours, side)["hidden_states"],  # type: ignore[arg-type]
            timesteps=timesteps,
            prompt=[text[0]],  # type: ignore[index]
            negative=[text[0, :10]],  # type: ignore[index]
            guidance_scale=4.0,
            image_shapes=[(1, grid, grid)],
        )
        result = denoise(ours, scheduler, inputs)
        return result, torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0

    expected, peak = run()
    note("denoising, modulation resident: weights on the device", allocated(), "GiB", peak)
    ours.offload_modulation("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    got, peak = run()
    note("denoising, modulation tabulated: weights on the device", allocated(), "GiB", peak)
    note("denoising, tabulated against resident, relative difference", relative(got, expected), "")
    if num_tabulated:
        sigmas = torch.linspace(1, 0.02, num_tabulated, device=ours.device, dtype=torch.bfloat16)
        milliseconds = timed(lambda: ours.tabulate_modulation(sigmas, dtype=torch.bfloat16), 1)[0]
        note(f"tabulating {num_tabulated} timesteps from host memory", milliseconds, "ms")
        ours.load_modulation()
