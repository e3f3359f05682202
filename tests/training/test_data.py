"""Metadata of every kind, sizes, bad files in one report, batches, captions, and the cache."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_data import config, random_picture, write_dataset

from diffusers_qwenimage.files import write_safetensors
from diffusers_qwenimage.training.cache import Encoders, TensorCache
from diffusers_qwenimage.training.data import inspect_rows, load_picture, training_size
from diffusers_qwenimage.training.metadata import read_rows
from diffusers_qwenimage.training.models import find_models
from diffusers_qwenimage.training.plan import Captions, Plan

ROWS = [("a.png", "a cat, sleeping"), ("b.jpg", "ein Hündchen"), ("c.webp", 'says "hi"'), ("d.jpeg", "")]


@pytest.fixture
def folder(tmp_path):
    for index, (name, _) in enumerate(ROWS):
        random_picture((64, 48), index).save(tmp_path / name)
    return tmp_path


def write_metadata(folder, kind):
    table = [{"image": image, "prompt": prompt} for image, prompt in ROWS]
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        with path.open("w", newline="\r\n", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["image", "prompt"])
            writer.writeheader()
            writer.writerows(table)
    elif kind == "json":
        path.write_text(json.dumps(table), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, table)) + "\n", encoding="utf-8")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(table), path)
    else:
        for image, prompt in ROWS:
            if prompt:
                (folder / image).with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "txt"])
def test_metadata(folder, kind, caplog):
    write_metadata(folder, kind)
    settings = config(dataset_base_path=str(folder))
    samples = inspect_rows(read_rows(settings), settings, progress=False)
    assert [(sample.image.name, sample.caption) for sample in samples] == ROWS
    assert all(sample.size == (64, 48) for sample in samples)
    assert "1 captions are empty: d.jpeg" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"image": "a.png", "prompt": "x"}\n{"image": "b', "cannot be read"),
        ("metadata.json", '{"image": "a.png"}', "must hold a list"),
        ("metadata.csv", "image,prompt\na.png,one, two\n", "more cells than columns"),
        ("metadata.csv", "image,prompt\n", "has no rows"),
        ("metadata.csv", "", "has no rows"),
    ],
)
def test_broken_metadata(folder, name, content, message):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_rows(config(dataset_base_path=str(folder)))


def test_bad_files_are_listed_together_and_can_be_left_out(folder, tmp_path_factory, caplog):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    random_picture((32, 32)).save(outside)
    (folder / "link.png").symlink_to(outside)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:500])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello", encoding="utf-8")
    (folder / "notes.txt").write_text("hello", encoding="utf-8")
    random_picture((8, 400)).save(folder / "thin.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    bad = {
        "../secret.png": "leaves the dataset's folder",
        str(outside): "leaves the dataset's folder",
        "link.png": "leaves the dataset's folder",
        "https://example.org/a.png": "is an address",
        "cut.png": "damaged",
        "empty.png": "",
        "text.png": "",
        "notes.txt": "is not one of .jpg",
        "gone.png": "does not exist",
        "thin.png": "fewer than 16x16",
        "bomb.png": "too large",
        "": "the name of the picture is ''",
        "nul\0.png": "the name of the picture",
    }
    table = [{"image": name, "prompt": "x"} for name in ["a.png", *bad]]
    (folder / "metadata.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ValueError, match="13 of 14 pictures cannot be used") as caught:
        settings = config(dataset_base_path=str(folder))
        inspect_rows(read_rows(settings), settings, progress=False)
    for index, reason in enumerate(bad.values(), start=2):
        assert f"entry {index}: " in str(caught.value) and reason in str(caught.value)
    settings = config(dataset_base_path=str(folder), on_bad_image="skip")
    assert [s.name for s in inspect_rows(read_rows(settings), settings, progress=False)] == ["a.png"]
    assert "They are left out" in caplog.text


@pytest.mark.parametrize(
    ("size", "expected"), [((4000, 3000), (1168, 880)), ((1000, 600), (992, 592)), ((513, 777), (512, 768))]
)
def test_dynamic_resolution_of_the_reference(size, expected):
    assert training_size(size, config()) == expected


def test_sizes_orientation_and_transparency(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    random_picture((64, 48)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (64, 48), (255, 0, 0, 0)).save(folder / "clear.png")
    table = [{"image": name, "prompt": "x"} for name in ("turned.jpg", "clear.png")]
    (folder / "metadata.json").write_text(json.dumps(table), encoding="utf-8")
    settings = config(dataset_base_path=str(folder))
    turned, clear = inspect_rows(read_rows(settings), settings, progress=False)
    assert turned.size == (48, 64) and load_picture(turned).size == (48, 64)
    assert load_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    fixed = config(dataset_base_path=str(folder), height=32, width=48)
    assert {s.size for s in inspect_rows(read_rows(fixed), fixed, progress=False)} == {(48, 32)}
    assert training_size((200, 150), config(bucket_step=64)) == (192, 128)


def test_plan_covers_every_sample_and_does_not_depend_on_processes():
    sizes = [(32, 48)] * 5 + [(48, 32)] * 4
    common = {"sizes": sizes, "repeat": 2, "batch_size": 2, "seed": 1}
    alone = Plan(**common, accumulation=2, world=1)
    pair = Plan(**common, accumulation=1, world=2)
    assert alone.steps_per_epoch == pair.steps_per_epoch == 5  # 5 + 4 batches, two a step
    for step in range(10):
        together = [alone.batch(step, micro, 0) for micro in range(2)]
        assert together == [pair.batch(step, 0, rank) for rank in range(2)]
        for batch in together:
            assert len({sizes[slot.index] for slot in batch}) == 1
    seen = [slot.index for step in range(5) for micro in range(2) for slot in alone.batch(step, micro, 0)]
    assert set(seen) == set(range(9)) and len(seen) >= 18
    first, second = ([alone.batch(e * 5 + i, 0, 0)[0].index for i in range(5)] for e in range(2))
    assert first != second
    counters = [slot.counter for step in range(9) for m in range(2) for slot in alone.batch(step, m, 0)]
    assert len(set(counters)) == len(counters)


def test_captions():
    captions = Captions(prefix="sks, ", shuffle=True, dropout=0.25, seed=3)
    texts = [captions.text("a, b, c", counter) for counter in range(2000)]
    assert set(texts) <= set(captions.all_texts("a, b, c"))
    assert 0.2 < texts.count("") / len(texts) < 0.3
    assert all(text == "" or sorted(text[5:].split(", ")) == ["a", "b", "c"] for text in texts)
    assert len(set(texts)) > 3
    assert texts[7] == captions.text("a, b, c", 7)


def test_cache_is_keyed_by_content_and_survives_damage(workplace, caplog):
    settings = config()
    samples = inspect_rows(read_rows(settings), settings, progress=False)
    files = find_models(settings)
    cache = TensorCache(Path("cache"))
    encoders = Encoders(files, cache, dtype=torch.float32, device=torch.device("cpu"))
    encoders.fill(samples, ["one", "two", ""], progress=False)
    assert encoders.loaded == []
    entries = sorted(Path("cache").rglob("*.safetensors"))
    assert len(entries) == len(samples) + 3
    expected = encoders.latents(samples[0]).clone()  # the file is mapped, and is changed below
    assert encoders.loaded == [] and expected.shape == (6, 64)

    again = Encoders(files, cache, dtype=torch.bfloat16, device=torch.device("cpu"))
    again.latents(samples[0])
    assert again.loaded == ["vae"]  # another type is another entry

    for path in entries:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert torch.equal(encoders.latents(samples[0]), expected)
    assert "is damaged (its content does not have the hash" in caplog.text
    entries[1].write_bytes(b"")
    write_safetensors(entries[2], {"other": torch.zeros(1)})
    fresh = Encoders(files, cache, dtype=torch.float32, device=torch.device("cpu"))
    fresh.fill(samples, ["one", "two", ""], progress=False)
    caplog.clear()
    fresh.fill(samples, ["one", "two", ""], progress=False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_large_metadata_is_read_quickly(tmp_path):
    write_dataset(tmp_path / "d", num=1, size=(32, 32))
    (tmp_path / "d" / "metadata.csv").write_text("image,prompt\n" + "0.png,x\n" * 100_000, encoding="utf-8")
    assert len(read_rows(config(dataset_base_path=str(tmp_path / "d")))) == 100_000
