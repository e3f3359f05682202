"""Files -> names -> tensors."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_qwenimage.checkpoint import from_tensors, open_checkpoint, shard_problem, weight_files

NAMES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def write_shards(folder: Path, *, index: bool = True) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{number}": torch.randn(2, 3) for number in range(3)}
    for name, (key, value) in zip(NAMES, tensors.items(), strict=True):
        save_file({key: value}, folder / name)
    if index:
        weight_map = dict(zip(tensors, NAMES, strict=True))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def assert_reads(source: object, tensors: dict[str, torch.Tensor]) -> None:
    read = dict(open_checkpoint(source).read())  # type: ignore[arg-type]
    assert sorted(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_from_a_folder_a_list_an_index_or_one_of_them(tmp_path: Path, index: bool) -> None:
    tensors = write_shards(tmp_path, index=index)
    assert_reads(tmp_path, tensors)
    assert_reads([tmp_path / name for name in reversed(NAMES)], tensors)
    assert_reads(tmp_path / NAMES[1], tensors)
    if index:
        assert_reads(tmp_path / "model.safetensors.index.json", tensors)


def test_a_single_file_and_tensors_in_memory(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4), "b": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert_reads(str(tmp_path / "x.safetensors"), tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in from_tensors(tensors).read())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    + [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64],
)
def test_every_type_and_shape_is_read_as_safetensors_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.arange(3000) % 7).to(torch.float32).to(dtype)
    tensors = {
        "a": values,
        "b": values[:6].reshape(1, 2, 3),
        "scalar": values[1],
        "none": values[:0].reshape(0, 4),
    }
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    read = dict(open_checkpoint(tmp_path / "x.safetensors").read())
    assert {name: (value.dtype, value.shape) for name, value in read.items()} == {
        name: (value.dtype, value.shape) for name, value in expected.items()
    }
    assert all(torch.equal(read[n].view(torch.uint8), expected[n].view(torch.uint8)) for n in ("a", "b"))
    assert torch.equal(read["scalar"].to(torch.complex64), expected["scalar"].to(torch.complex64))


def test_a_tensor_behind_one_of_odd_length_is_read(tmp_path: Path) -> None:
    entries = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "weight": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    header = json.dumps(entries).encode()
    data = bytes([1, 2, 3]) + struct.pack("<ff", 0.5, -2.0)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    read = dict(open_checkpoint(tmp_path / "x.safetensors").read())
    assert read["weight"].tolist() == [0.5, -2.0] and read["odd"].tolist() == [1, 2, 3]


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(5000)}, file)
    before = file.read_bytes()
    tensor = dict(open_checkpoint(file).read())["a"]
    tensor += 1
    assert tensor.sum() == 5000
    assert file.read_bytes() == before


def test_variants_beside_the_main_file_are_left_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert_reads(tmp_path, tensors)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="00003-of-00003.*same folder"):
        open_checkpoint([tmp_path / name for name in NAMES[:2]])
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names 'model-00002-of-00003"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards.*'model-00002-of-00003.*fetch it"):
        open_checkpoint(tmp_path / NAMES[0])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        open_checkpoint(tmp_path / "empty")
    assert shard_problem([tmp_path / "model.safetensors"]) is None


def test_a_key_in_two_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="'same' is in .*a.safetensors and in .*b.safetensors"):
        open_checkpoint([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_an_index_of_other_shards_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / NAMES[0])
    with pytest.raises(ValueError, match="places 'layer.0' in shards that do not hold"):
        open_checkpoint([tmp_path / name for name in NAMES])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_a_broken_index_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="index"):
        weight_files(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(100)}, good)
    whole = good.read_bytes()
    pickle = tmp_path / "pickle.safetensors"
    torch.save({"a": torch.zeros(1)}, pickle)
    damaged = {
        "truncated": whole[:-1],
        "longer": whole + b"x",
        "empty": b"",
        "pickle": pickle.read_bytes(),
        "web page": b"<!doctype html><html></html>",
        "header": struct.pack("<Q", 2**60) + whole[8:],
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }
    for problem, content in damaged.items():
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"(?i){problem}"):
            open_checkpoint(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no tensors"):
        open_checkpoint(tmp_path / "x.safetensors")
