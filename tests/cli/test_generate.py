"""`qwenimage generate`, on a tiny random model."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_made import MODULES, lora_tensors, write_lora
from model_files import write_model
from PIL import Image

import diffusers_qwenimage
from diffusers_qwenimage import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline
from diffusers_qwenimage.cli import main
from diffusers_qwenimage.cli.generate_options import Lora, fit_area, lora, number_paths
from diffusers_qwenimage.images import read_metadata
from diffusers_qwenimage.loading import load_components


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def picture(folder: Path) -> Image.Image:
    """Written to start.png."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    image.save(folder / "start.png")
    return image


def generate(model: Path, *arguments: str) -> int:
    settings = ("--model", str(model), "--steps", "2", "--dtype", "float32", "--device", "cpu")
    return main(["generate", "a cat", *settings, *arguments])


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_file_is_what_the_pipeline_makes(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, "--size", "64x48", "--seed", "5", "-o", "new/cat.png") == 0
    out, err = capsys.readouterr()
    assert out == f"new{os.sep}cat.png\n"
    assert "Seed 5" in err and "2/2" in err  # the progress bar
    pipeline = QwenImagePipeline(**vars(load_components(model, dtype=torch.float32)))
    expected = pipeline(
        "a cat",
        negative_prompt="",
        true_cfg_scale=4.0,
        num_inference_steps=2,
        width=64,
        height=48,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.array_equal(pixels("new/cat.png"), np.asarray(expected))
    metadata = read_metadata("new/cat.png")
    assert metadata.pop("version").startswith("diffusers-qwenimage ")
    assert metadata == {
        "prompt": "a cat",
        "negative_prompt": "",
        "seed": "5",
        "steps": "2",
        "cfg": "4",
        "size": "64x48",
        "model": str(model),
        "dtype": "float32",
    }


def test_a_seed_is_drawn_reported_and_enough_to_make_the_picture_again(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, "--size", "32x32") == 0
    drawn = read_metadata("out.png")["seed"]
    assert f"Seed {drawn}\n" in capsys.readouterr().err
    first = pixels("out.png")
    assert generate(model, "--size", "32x32", "--seed", drawn) == 0
    assert np.array_equal(pixels("out.png"), first)
    assert generate(model, "--size", "32x32") == 0
    assert read_metadata("out.png")["seed"] != drawn


def test_guidance_is_off_at_one_and_moved_by_the_negative_prompt(model: Path, folder: Path) -> None:
    common = ("--size", "32x32", "--seed", "1")
    assert generate(model, *common, "--cfg", "1", "-o", "off.png") == 0
    assert generate(model, *common, "-o", "empty.png") == 0
    assert generate(model, *common, "--negative-prompt", "a dog", "-o", "dog.png") == 0
    assert not np.array_equal(pixels("off.png"), pixels("empty.png"))
    assert not np.array_equal(pixels("empty.png"), pixels("dog.png"))
    assert read_metadata("dog.png")["negative_prompt"] == "a dog"


def test_several_pictures_count_their_seeds_and_replace_files(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cat-2.webp").write_bytes(b"old")
    assert generate(model, "--size", "32x32", "--seed", "7", "--num-images", "2", "-o", "cat.webp") == 0
    assert capsys.readouterr().out == "cat-1.webp\ncat-2.webp\n"
    assert sorted(path.name for path in folder.iterdir()) == ["cat-1.webp", "cat-2.webp"]
    assert [read_metadata(f"cat-{n}.webp")["seed"] for n in (1, 2)] == ["7", "8"]
    assert generate(model, "--size", "32x32", "--seed", "8", "-o", "alone.png") == 0
    assert np.array_equal(pixels("alone.png"), pixels("cat-2.webp"))


def test_image_to_image_and_inpaint(model: Path, folder: Path, picture: Image.Image) -> None:
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, 32, 48))
    mask.save("mask.png")
    common = ("--size", "64x48", "--seed", "3", "--init-image", "start.png", "--strength", "0.5")
    assert generate(model, *common, "-o", "whole.png") == 0
    assert generate(model, *common, "--mask", "mask.png", "-o", "part.png") == 0
    assert read_metadata("part.png")["strength"] == "0.5"
    parts = vars(load_components(model, dtype=torch.float32))
    arguments = {
        "prompt": "a cat",
        "negative_prompt": "",
        "image": picture,
        "strength": 0.5,
        "num_inference_steps": 2,
        "width": 64,
        "height": 48,
    }
    whole = QwenImageImg2ImgPipeline(**parts)(**arguments, generator=torch.Generator().manual_seed(3))
    part = QwenImageInpaintPipeline(**parts)(
        **arguments, mask_image=mask, generator=torch.Generator().manual_seed(3)
    )
    assert np.array_equal(pixels("whole.png"), np.asarray(whole.images[0]))
    assert np.array_equal(pixels("part.png"), np.asarray(part.images[0]))
    assert not np.array_equal(pixels("whole.png"), pixels("part.png"))


def test_metadata_of_a_prompt_in_any_script(model: Path, folder: Path) -> None:
    prompt = 'Ein Schild "Größe" — 通义千问 🐈'
    arguments = ["generate", prompt, "--model", str(model), "--steps", "1", "--size", "32x32", "--cfg", "1"]
    assert main([*arguments, "-o", "sign.jpg"]) == 0
    assert read_metadata("sign.jpg")["prompt"] == prompt


def test_loras_are_applied_at_their_strengths_and_reported(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"modules": MODULES[:-1], "hidden": 32}
    write_lora(folder / "a=b.safetensors", "kohya", **sizes)
    write_lora(folder / "style.safetensors", "opensource", seed=1, **sizes)
    common = ("--size", "32x32", "--seed", "1")
    assert generate(model, *common, "-o", "plain.png") == 0
    capsys.readouterr()
    loras = ("--lora", "a=b.safetensors", "--lora", "style.safetensors=0.5")
    assert generate(model, *common, *loras, "-o", "both.png") == 0
    err = capsys.readouterr().err
    assert "LoRA a=b.safetensors: 9 layers changed at strength 1 (formats kohya; kinds lora)\n" in err
    assert "LoRA style.safetensors: 9 layers changed at strength 0.5 (formats opensource;" in err
    assert read_metadata("both.png")["lora"] == "a=b.safetensors=1, style.safetensors=0.5"
    assert not np.array_equal(pixels("plain.png"), pixels("both.png"))
    parts = load_components(model, dtype=torch.float32)
    pipeline = QwenImagePipeline(**vars(parts))
    for name, format_name, seed in (("a", "kohya", 0), ("b", "opensource", 1)):
        pipeline.load_lora_weights(lora_tensors(format_name, seed=seed, **sizes), adapter_name=name)
    pipeline.set_adapters(["a", "b"], [1.0, 0.5])
    expected = pipeline(
        "a cat",
        negative_prompt="",
        num_inference_steps=2,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert np.array_equal(pixels("both.png"), np.asarray(expected))
    assert generate(model, *common, "--lora", "style.safetensors=0", "-o", "none.png") == 0
    assert np.array_equal(pixels("none.png"), pixels("plain.png"))


@pytest.mark.parametrize(
    "options", [("--vram", "0"), ("--vram", "1"), ("--vram", "0", "--lora", "a.safetensors")]
)
def test_pictures_within_a_budget_are_the_same(
    options: tuple[str, ...], model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lora(folder / "a.safetensors", modules=MODULES[:-1], hidden=32)
    # In bf16: in fp32 the CPU rounds one row of the modulation otherwise than two.
    common = ("--size", "32x32", "--seed", "1", "--dtype", "bfloat16")
    assert generate(model, *common, *options[2:], "-o", "plain.png") == 0
    capsys.readouterr()
    assert generate(model, *common, *options, "-o", "budget.png") == 0
    err = capsys.readouterr().err
    assert f"Loading {model}: 0.0 GiB of weights (" in err
    assert "Memory on cpu: budget" in err and "expected peak" in err
    assert np.array_equal(pixels("plain.png"), pixels("budget.png"))


def test_8_bit_weights(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--size", "32x32", "--seed", "1", "--dtype", "bfloat16")
    assert generate(model, *common, "-o", "plain.png") == 0
    assert generate(model, *common, "--weights", "fp8", "-o", "fp8.png") == 0
    difference = np.abs(pixels("plain.png").astype(int) - pixels("fp8.png").astype(int))
    assert 0 < difference.mean() < 64


def test_a_budget_that_is_too_small_is_one_line(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, "--size", "32x32", "--vram", "0.001") == 2
    assert "the smallest budget that works is" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_qwenimage.cli.placement.host_bytes", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", "a cat", "--model", str(model)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "GiB of weights (" in line and "--vram makes it fit" in line
    assert generate(model, "--size", "32x32") == 0  # --device cpu insists
    assert "It will be very slow" in capsys.readouterr().err


def test_a_lora_of_another_model_is_refused(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lora(folder / "other.safetensors", hidden=48)
    assert generate(model, "--size", "32x32", "--lora", "other.safetensors") == 2
    assert "other.safetensors does not fit" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out.png").exists()


def test_lora_arguments() -> None:
    assert lora("a.safetensors") == Lora(source="a.safetensors", strength=1.0)
    assert lora("a.safetensors=-0.5") == Lora(source="a.safetensors", strength=-0.5)
    assert lora("x=y.safetensors") == Lora(source="x=y.safetensors", strength=1.0)
    assert lora("x=y.safetensors=2") == Lora(source="x=y.safetensors", strength=2.0)


def test_the_size_that_a_folder_states_is_the_default(folder: Path) -> None:
    copy = folder / "model"
    shutil.copytree(EMBEDDED, copy)
    assert main(["generate", "a", "--model", str(copy), "--steps", "1", "--device", "cpu"]) == 0
    assert pixels("out.png").shape == (256, 256, 3)


EMBEDDED = Path(diffusers_qwenimage.__file__).parent / "assets" / "tiny"


def test_without_a_model_the_embedded_one_is_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red circle", "--steps", "2", "--device", "cpu"]) == 0
    assert "Using the small model inside this package" in capsys.readouterr().err
    metadata = read_metadata("out.png")
    assert (metadata["model"], metadata["size"], metadata["dtype"]) == ("embedded", "256x256", "float32")
    assert pixels("out.png").shape == (256, 256, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100x100"], "not in multiples of 16 pixels; the nearest is 96x96"),
        (["--size", "0x16"], "not in multiples of 16 pixels; the nearest is 16x16"),
        (["--size", "large"], "'large' is not WIDTHxHEIGHT, such as 1024x768"),
        (["--size", "100x100000"], "'100x100000' is too large"),
        (["--lora", "a.safetensors=strong"], "is not FILE or FILE=STRENGTH"),
        (["--model", "./nowhere"], "nor the path of a file or folder that exists"),
        (["--device", "gpu"], "take cpu, cuda, cuda:1 or mps"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--steps", "2.5"], "'2.5' is not a whole number"),
        (["--num-images", "-1"], "'-1' is not a whole number"),
        (["--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--seed", str(2**63)], "is not a whole number from 0"),
        (["--cfg", "nan"], "'nan' is not a number of at least 0"),
        (["--cfg", "1", "--negative-prompt", "x"], "--negative-prompt needs --cfg above 1, got 1"),
        (["--strength", "0.5"], "--strength needs --init-image"),
        (["--init-image", "start.png", "--strength", "0"], "'0' is not a number above 0 and at most 1"),
        (["--mask", "start.png"], "--mask needs --init-image"),
        (["--init-image", "gone.png"], "gone.png does not exist"),
        (["--init-image", "text.png"], "text.png is not a picture that can be read"),
        (["--init-image", "start.png", "--mask", "small.png"], "small.png has 8x8 pixels, the picture"),
        (["-o", "out.gif"], "out.gif has the suffix '.gif'"),
        (["-o", "."], "has the suffix ''"),
        (["-o", "folder.png"], "folder.png is a folder"),
        (["-o", "text.png/out.png"], "cannot be written: no file can be made in"),
        (["--device", "nonsense"], "The device 'nonsense' cannot be used"),
        (["--device", "meta"], "holds no values"),
        (["--model", "no/such/model"], "neither the id of a model"),
        (["--model", "folder.png"], "is not a model in diffusers' layout"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--lora", "=1"], "'=1' is not FILE or FILE=STRENGTH"),
        (["--lora", "gone.safetensors"], "gone.safetensors"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--ste", "2"], "unrecognized arguments: --ste"),
    ],
)
def test_bad_arguments_are_one_line_and_two(
    arguments: list[str],
    message: str,
    folder: Path,
    picture: Image.Image,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("L", (8, 8)).save("small.png")
    Path("text.png").write_text("no picture")
    Path("folder.png").mkdir()
    before = sorted(folder.rglob("*"))
    assert main(["generate", "a cat", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("qwenimage: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


def test_a_prompt_that_is_no_text_is_refused(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a \udc80", "--model", str(model), "--size", "32x32"]) == 2
    assert "no valid Unicode text" in capsys.readouterr().err


def test_no_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate"]) == 2
    assert "the following arguments are required: prompt" in capsys.readouterr().err


def test_an_empty_prompt_is_a_prompt(model: Path, folder: Path) -> None:
    assert main(["generate", "", "--model", str(model), "--size", "32x32", "--steps", "1"]) == 0
    assert read_metadata("out.png")["prompt"] == ""


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["generate", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--model",
        "--negative-prompt",
        "--steps",
        "--cfg",
        "--seed",
        "--size",
        "--init-image",
        "--strength",
        "--mask",
        "--num-images",
        "--dtype",
        "--device",
        "--lora",
        "--vram",
        "--weights",
        "-o FILE",
    ):
        assert option in text


def test_a_run_of_its_own(model: Path, folder: Path) -> None:
    """As a user calls it: another process, also for the exit code."""
    command = [sys.executable, "-m", "diffusers_qwenimage", "generate", "a cat", "--model", str(model)]
    done = subprocess.run(
        [*command, "--size", "32x32", "--steps", "1"], capture_output=True, text=True, cwd=folder
    )
    assert (done.returncode, done.stdout) == (0, "out.png\n"), done.stderr
    assert "Warning" not in done.stderr
    failed = subprocess.run([*command, "--size", "1x1"], capture_output=True, text=True, cwd=folder)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupting_leaves_the_old_file(model: Path, folder: Path) -> None:
    (folder / "out.png").write_bytes(b"old")
    command = [sys.executable, "-m", "diffusers_qwenimage", "generate", "a cat", "--model", str(model)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--size", "256x256", "--steps", "5000"],
            stderr=log,
            stdout=log,
            cwd=folder,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background job
        )
    try:
        deadline = time.monotonic() + 120
        while "/5000" not in (folder / "log").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert (folder / "log").read_text().splitlines()[-1] == "Interrupted."
    assert (folder / "out.png").read_bytes() == b"old"
    assert sorted(path.name for path in folder.iterdir()) == ["log", "out.png"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (256, 256)), ((640, 480), (288, 224)), ((4000, 1000), (512, 128)), ((1, 10000), (16, 25600))],
)
def test_fit_area(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_area(size, 256 * 256) == expected


def test_number_paths() -> None:
    assert number_paths(Path("a/b.c.png"), 1) == [Path("a/b.c.png")]
    assert number_paths(Path("a/b.c.png"), 2) == [Path("a/b.c-1.png"), Path("a/b.c-2.png")]
