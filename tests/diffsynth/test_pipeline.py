"""The DiffSynth-style pipeline: DiffSynth-Studio's README, and the meaning of every argument."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import HubServer
from model_files import tiny_vae
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffusers_qwenimage import QwenImagePipeline as DiffusersStylePipeline
from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.diffsynth import ModelConfig, QwenImagePipeline
from diffusers_qwenimage.images import open_image

MODEL = "Qwen/Qwen-Image"
# From DiffSynth-Studio's README for Qwen-Image (Apache-2.0), the import line changed.
QUICK_START = """
from diffusers_qwenimage.diffsynth import QwenImagePipeline, ModelConfig
import torch


pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors"),
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model*.safetensors"),
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/"),
)
prompt = "A detailed portrait of a girl underwater, wearing a blue flowing dress, hair gently floating, clear light and shadow, surrounded by bubbles, calm expression, fine details, dreamy and beautiful."
image = pipe(prompt, seed=0, num_inference_steps=40)
image.save("image.jpg")
"""  # noqa: E501
SMALL = {"height": 32, "width": 48, "num_inference_steps": 3, "progress_bar_cmd": lambda steps: steps}


def configs(folder: Path, **changes: Any) -> list[ModelConfig]:
    names = ("transformer", "text_encoder", "vae")
    return [ModelConfig(folder / name, **changes) for name in names]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(
        torch_dtype=dtype,
        device="cpu",
        model_configs=configs(folder),
        tokenizer_config=ModelConfig(folder / "tokenizer"),
    )


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> QwenImagePipeline:
    return load(model_folder)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


# --- the README ---


@pytest.mark.parametrize("served", ["modelscope", "local folder"])
def test_the_quick_start_runs(
    served: str, hub: HubServer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, but for the device and, as this is a CPU, the size."""
    monkeypatch.chdir(tmp_path)
    if served == "modelscope":
        hub.add_folder(MODEL, model_folder)
    else:
        shutil.copytree(model_folder, tmp_path / "models" / MODEL)
    code = QUICK_START.replace('device="cuda"', 'device="cpu"').replace(
        "seed=0,", "seed=0, height=64, width=48,"
    )
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert open_image("image.jpg").size == (48, 64)
    assert bool(hub.requests) == (served == "modelscope")
    again = scope["pipe"](scope["prompt"], seed=0, num_inference_steps=40, height=64, width=48)
    assert np.array_equal(pixels(again), pixels(scope["image"]))


@pytest.mark.gpu
def test_the_quick_start_runs_word_for_word(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "models" / MODEL)
    exec(QUICK_START, {})
    assert open_image("image.jpg").size == (1328, 1328)


def test_load_model_by_files_as_the_readme_lists_them(model_folder: Path, pipe: QwenImagePipeline) -> None:
    files = [
        sorted((model_folder / name).glob("*.safetensors")) for name in ("transformer", "text_encoder", "vae")
    ]
    loaded = QwenImagePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig([str(file) for file in group]) for group in reversed(files)],
        tokenizer_config=ModelConfig(path=str(model_folder / "tokenizer")),
    )
    assert np.array_equal(pixels(loaded("a", seed=1, **SMALL)), pixels(pipe("a", seed=1, **SMALL)))


def test_a_whole_repository_in_one_config(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / MODEL)
    everything = ModelConfig(model_id=MODEL, local_model_path=tmp_path, skip_download=True)
    loaded = QwenImagePipeline.from_pretrained(
        device="cpu",
        model_configs=[everything],
        tokenizer_config=ModelConfig(
            model_id=MODEL, origin_file_pattern="tokenizer/", local_model_path=tmp_path, skip_download=True
        ),
    )
    assert loaded.torch_dtype == loaded.dit.dtype == loaded.vae.dtype == torch.bfloat16
    assert loaded("a", **SMALL).size == (48, 32)


def test_every_input_parameter_of_the_readme_is_accepted(
    pipe: QwenImagePipeline, picture: Image.Image
) -> None:
    image = pipe(
        prompt="a red circle",
        negative_prompt="blurry",
        cfg_scale=4.0,
        input_image=picture,
        denoising_strength=0.7,
        height=32,
        width=48,
        seed=0,
        rand_device="cpu",
        num_inference_steps=2,
        tiled=True,
        tile_size=128,
        tile_stride=64,
        progress_bar_cmd=lambda x: x,
    )
    assert image.size == (48, 32) and image.mode == "RGB"
    with pytest.raises(TypeError, match="num_steps"):
        pipe("a", num_steps=2)  # type: ignore[call-arg]


# --- meaning ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_text_to_image_equals_the_diffusers_style_pipeline(
    model_folder: Path, dtype: torch.dtype, scale: float
) -> None:
    stock_style = DiffusersStylePipeline.from_pretrained(model_folder, dtype=dtype)
    stock_style.set_progress_bar_config(disable=True)
    expected = stock_style(
        "a red circle",
        negative_prompt="a blue square" if scale > 1 else None,
        true_cfg_scale=scale,
        height=32,
        width=48,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    ours = load(model_folder, dtype)(
        "a red circle", negative_prompt="a blue square", cfg_scale=scale, seed=5, **SMALL
    )
    assert np.array_equal(pixels(ours), pixels(expected))


def seen_by_the_transformer(pipe: QwenImagePipeline, **arguments: Any) -> list[dict[str, Any]]:
    """The keyword arguments of every call of the transformer."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    handle = pipe.dit.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe("a", **{**SMALL, **arguments})
    finally:
        handle.remove()
    return calls


def formula(num_steps: int, strength: float, tokens: int) -> Tensor:
    """DiffSynth-Studio's schedule for Qwen-Image (`FlowMatchScheduler`), in double precision."""
    sigmas = torch.linspace(strength, 0, num_steps + 1, dtype=torch.float64)[:-1]
    mu = 0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256)
    shifted = torch.exp(torch.tensor(mu)) / (torch.exp(torch.tensor(mu)) + 1 / sigmas - 1)
    rest = 1 - shifted
    return 1 - rest * (1 - 0.02) / rest[-1]


@pytest.mark.parametrize(("num_steps", "strength"), [(2, 1.0), (10, 1.0), (10, 0.6), (40, 0.05)])
def test_strength_compresses_the_schedule_and_keeps_all_steps(
    pipe: QwenImagePipeline, picture: Image.Image, num_steps: int, strength: float
) -> None:
    calls = seen_by_the_transformer(
        pipe, input_image=picture, denoising_strength=strength, num_inference_steps=num_steps
    )
    sigmas = torch.stack([call["timestep"][0] for call in calls]).double()
    assert len(sigmas) == num_steps
    # float32 holds sigmas to 6e-8, and a few operations of the scheduler are in float32
    assert torch.allclose(sigmas, formula(num_steps, strength, tokens=6), atol=1e-6, rtol=0)


def test_the_first_sigma_of_the_reference(pipe: QwenImagePipeline) -> None:
    assert formula(10, 0.6, tokens=64 * 64)[0].item() == pytest.approx(0.7238, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_is_drawn_as_diffsynth_draws_it(model_folder: Path, dtype: torch.dtype) -> None:
    calls = seen_by_the_transformer(load(model_folder, dtype), seed=7)
    generator = torch.Generator("cpu").manual_seed(7)
    noise = torch.randn((1, 16, 4, 6), generator=generator, dtype=dtype)
    assert torch.equal(calls[0]["hidden_states"], packing.pack(noise))


def test_image_to_image_starts_from_the_mode_of_the_picture(
    pipe: QwenImagePipeline, picture: Image.Image
) -> None:
    calls = seen_by_the_transformer(pipe, seed=7, input_image=picture, denoising_strength=0.5)
    values = torch.from_numpy(pixels(picture).copy()).float().permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        mode = pipe.vae.encode(values).latent_dist.mode()
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    clean = ((mode - mean) / std)[:, :, 0]
    noise = torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(7))
    sigma = formula(3, 0.5, tokens=6)[0].float()
    expected = packing.pack((1 - sigma) * clean + sigma * noise)
    # the order of float32 operations differs
    assert torch.allclose(calls[0]["hidden_states"], expected, atol=1e-5)


def test_strength_0_gives_the_picture_through_the_vae_and_1_ignores_it(
    pipe: QwenImagePipeline, picture: Image.Image
) -> None:
    kept = pipe("a", seed=1, input_image=picture, denoising_strength=0, **SMALL)
    with torch.no_grad():
        values = torch.from_numpy(pixels(picture).copy()).float().permute(2, 0, 1)[None, :, None] / 127.5 - 1
        through = pipe.vae.decode(pipe.vae.encode(values).latent_dist.mode()).sample[0, :, 0]
    expected = ((through.permute(1, 2, 0) + 1) * 127.5).round().numpy()
    # a value next to .5 may round either way
    assert np.abs(pixels(kept).astype(float) - expected).max() <= 1
    ignored = pipe("a", seed=1, input_image=picture, denoising_strength=1, **SMALL)
    assert np.array_equal(pixels(ignored), pixels(pipe("a", seed=1, **SMALL)))


def test_seeds(pipe: QwenImagePipeline) -> None:
    first = pixels(pipe("a", seed=0, **SMALL))
    assert np.array_equal(first, pixels(pipe("a", seed=0, **SMALL)))
    assert np.array_equal(first, pixels(pipe("a", seed=np.int64(0), **SMALL)))  # type: ignore[arg-type]
    assert not np.array_equal(first, pixels(pipe("a", seed=1, **SMALL)))
    own = torch.Generator().manual_seed(0)
    assert np.array_equal(first, pixels(pipe("a", generator=own, **SMALL)))
    with pytest.raises(ValueError, match="either seed or generator"):
        pipe("a", seed=0, generator=own, **SMALL)
    assert not np.array_equal(pixels(pipe("a", **SMALL)), pixels(pipe("a", **SMALL)))


def test_guidance_acts_above_1_only(pipe: QwenImagePipeline) -> None:
    plain = pixels(pipe("a", seed=0, **SMALL))
    for scale in (0.0, 0.5, 1.0):
        same = pipe("a", negative_prompt="b", cfg_scale=scale, seed=0, **SMALL)
        assert np.array_equal(plain, pixels(same))
    calls = seen_by_the_transformer(pipe, cfg_scale=3.0, negative_prompt="b")
    assert len(calls[0]["encoder_hidden_states"]) == 2, 'the default "" and any other negative prompt count'
    assert len(seen_by_the_transformer(pipe, cfg_scale=3.0)[0]["encoder_hidden_states"]) == 2


def test_sizes_off_the_grid_are_rounded_up_and_so_is_the_shift(
    pipe: QwenImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {**SMALL, "height": 17, "width": 33}
    image = pipe("a", seed=0, **arguments)
    assert image.size == (48, 32)
    assert "17 x 33 is rounded up to 32 x 48" in caplog.text
    assert np.array_equal(pixels(image), pixels(pipe("a", seed=0, **SMALL)))


def test_a_picture_off_the_grid_is_resized_with_it(pipe: QwenImagePipeline, picture: Image.Image) -> None:
    odd = picture.resize((45, 30))
    image = pipe("a", input_image=odd, denoising_strength=0.5, **{**SMALL, "height": 30, "width": 45})
    assert image.size == (48, 32)


def test_one_step_gives_a_picture(pipe: QwenImagePipeline, picture: Image.Image) -> None:
    calls = seen_by_the_transformer(pipe, num_inference_steps=1)
    assert len(calls) == 1 and calls[0]["timestep"].item() == 1.0
    image = pipe("a", **{**SMALL, "num_inference_steps": 1}, input_image=picture, denoising_strength=0.5)
    assert pixels(image).std() > 0


def test_tiles_change_the_picture_little_and_for_one_call_only(model_folder: Path) -> None:
    pipe = load(model_folder)
    size = {**SMALL, "height": 64, "width": 96}
    whole, fits = pipe("a", seed=0, **size), pipe("a", seed=0, tiled=True, **size)
    assert np.array_equal(pixels(whole), pixels(fits)), "an image that fits one tile of 128 is not cut"
    tiles = pipe("a", seed=0, tiled=True, tile_size=6, tile_stride=4, **size)
    difference = np.abs(pixels(whole).astype(float) - pixels(tiles))
    # random weights; attention over one tile only shifts colours by a few levels
    assert 0 < difference.mean() < 12
    assert not pipe.vae.use_tiling and pipe.vae.tile_sample_min_height == 256
    with pytest.raises(ValueError, match="stride"):
        pipe("a", tiled=True, tile_size=4, tile_stride=8, **size)
    assert not pipe.vae.use_tiling


@pytest.mark.parametrize("kind", ["generator", "list", "identity"])
def test_the_progress_bar_sees_every_step(pipe: QwenImagePipeline, kind: str) -> None:
    done: list[int] = []

    def bar(steps: Iterable[Any]) -> Iterable[Any]:
        assert len(list(steps)) == 3
        if kind != "generator":
            return list(steps) if kind == "list" else steps

        def count() -> Iterator[Any]:
            for number, step in enumerate(steps):
                yield step
                done.append(number)

        return count()

    pipe("a", **{**SMALL, "progress_bar_cmd": bar})
    assert done == ([0, 1, 2] if kind == "generator" else [])


def test_tqdm_is_the_default_bar(pipe: QwenImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("a", height=16, width=16, num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": ["a", "b"]}, "one text, got list"),
        ({"negative_prompt": None, "cfg_scale": 2.0}, "one text, got NoneType"),
        ({"prompt": "\ud800"}, "no valid Unicode"),
        ({"denoising_strength": 0.5}, "there is no input_image"),
        ({"denoising_strength": 1.5}, "between 0 and 1"),
        ({"denoising_strength": float("nan")}, "between 0 and 1"),
        ({"height": 0}, "height must be a positive"),
        ({"width": 33.0}, "width must be a positive"),
        ({"width": True}, "width must be a positive"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"seed": "0"}, "seed must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"cfg_scale": float("nan")}, "finite"),
        ({"tiled": True, "tile_size": 0}, "stride"),
        ({"input_image": Image.new("RGB", (64, 64))}, r"64 x 64 pixels.*pass height=64, width=64"),
        ({"input_image": "missing.png"}, None),
    ],
)
def test_what_cannot_be_met_is_refused(
    pipe: QwenImagePipeline, arguments: dict[str, Any], said: str | None
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        pipe(**{"prompt": "a", **SMALL, **arguments})


@pytest.mark.parametrize("mode", ["RGBA", "L", "CMYK", "P", "I;16"])
def test_pictures_of_every_mode_start_an_image(
    pipe: QwenImagePipeline, picture: Image.Image, mode: str
) -> None:
    start = picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    assert pipe("a", input_image=start, denoising_strength=0.5, **SMALL).size == (48, 32)


@pytest.mark.parametrize("prompt", ["", "   ", "<|im_end|>", "\U0001f600 \u05e9\u05dc\u05d5\u05dd"])
def test_odd_prompts_are_prompts(pipe: QwenImagePipeline, prompt: str) -> None:
    assert pipe(prompt, **SMALL).size == (48, 32)


def test_a_prompt_over_the_limit_is_cut_with_a_warning(
    pipe: QwenImagePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipe("\u00e9" * 1000, **{**SMALL, "num_inference_steps": 1})
    assert "too long: its last" in caplog.text


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("transformer", "has no dit.*transformer/diffusion_pytorch_model"),
        ("text_encoder", "has no text_encoder.*text_encoder/model"),
        ("vae", "has no vae.*vae/diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_missing_model_is_an_error_when_it_is_needed(model_folder: Path, missing: str, said: str) -> None:
    kept = [config for config in configs(model_folder) if Path(str(config.path)).name != missing]
    tokenizer = ModelConfig(model_folder / "tokenizer")
    pipe = QwenImagePipeline.from_pretrained(device="cpu", model_configs=kept, tokenizer_config=tokenizer)
    with pytest.raises(ValueError, match=said):
        pipe("a", **SMALL)


def test_a_missing_tokenizer_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    pipe = QwenImagePipeline.from_pretrained(
        device="cpu", model_configs=configs(model_folder), tokenizer_config=None
    )
    with pytest.raises(ValueError, match="no tokenizer.*tokenizer_config"):
        pipe("a", **SMALL)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        QwenImagePipeline.from_pretrained(device="cpu", tokenizer_config=ModelConfig(tmp_path / "none"))


def test_files_that_fit_nothing_or_come_twice_are_named(model_folder: Path, tmp_path: Path) -> None:
    save_file({"strange.key": torch.zeros(1)}, tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match=r"strange\.safetensors.*Expected.*'strange.key'"):
        QwenImagePipeline.from_pretrained(
            device="cpu", model_configs=[ModelConfig(tmp_path / "strange.safetensors")], tokenizer_config=None
        )
    tiny_vae().save_pretrained(tmp_path / "vae")
    twice = [*configs(model_folder), ModelConfig(tmp_path / "vae")]
    with pytest.raises(ValueError, match="The vae comes twice"):
        QwenImagePipeline.from_pretrained(device="cpu", model_configs=twice, tokenizer_config=None)
    with pytest.raises(ValueError, match="must be a list"):
        QwenImagePipeline.from_pretrained(
            device="cpu",
            model_configs=ModelConfig(tmp_path),
            tokenizer_config=None,  # type: ignore[arg-type]
        )


def test_a_pattern_without_weights_is_named(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / MODEL)
    config = ModelConfig(model_id=MODEL, origin_file_pattern="tokenizer/", local_model_path=tmp_path)
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        QwenImagePipeline.from_pretrained(device="cpu", model_configs=[config], tokenizer_config=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_an_error(pipe: QwenImagePipeline) -> None:
    with pytest.raises(ValueError, match='Use device="cpu"'):
        QwenImagePipeline.from_pretrained(model_configs=[], tokenizer_config=None)
    with pytest.raises(ValueError, match="no such GPU"):
        pipe("a", **SMALL, rand_device="cuda")
