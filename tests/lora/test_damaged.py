"""Damaged and hostile files: one clear error each, nothing written, little memory."""

import json
import pickle
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lora_samples import samples
from safetensors.torch import save
from torch import Tensor

from diffusers_qwenimage.cli import main
from diffusers_qwenimage.lora.convert import convert_lora

Q = "transformer_blocks.0.attn.to_q"
MAX_MESSAGE = 2000  # characters; a message lists the first few problems, not all
MAX_GROWTH = 200 * 2**20  # bytes of resident memory over all cases together


def good() -> dict[str, Tensor]:
    return samples()["qwen_image_lightning"].tensors()


def content(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return save(tensors, metadata)


def with_header(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: object, start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header_cases() -> Iterator[tuple[str, bytes]]:
    whole = content(good())
    length = struct.unpack("<Q", whole[:8])[0]
    cuts = [1, 7, 8, 9, 100, length // 2, length + 7, length + 8, len(whole) // 2, len(whole) - 1]
    cuts += [length + 8 + (len(whole) - length) * k // 11 for k in range(1, 10)]
    yield from ((f"cut at {cut}", whole[:cut]) for cut in sorted(set(cuts)))
    yield "one byte too many", whole + b"\0"
    yield "empty", b""
    for claimed in (0, 1, length - 1, length + 8, 10**8 + 1, 2**40, 2**60, 2**63, 2**64 - 1):
        yield f"header length {claimed}", struct.pack("<Q", claimed) + whole[8:]
    for name, text in {
        "no JSON": b"x" * 64,
        "half JSON": b'{"a":{"dtype":"F32"',
        "a list": b"[1, 2]",
        "a number": b"12345678",
        "null": b"null    ",
        "bad UTF-8": b'{"\xff\xfe": 1}',
        "deep nesting": b"[" * 200_000,
        "deep objects": b'{"a":' * 100_000,
        "only metadata": b'{"__metadata__":{"format":"pt"}}',
        "metadata a list": b'{"__metadata__":[]}'.replace(b"[]", b"[1]"),
        "metadata not text": b'{"__metadata__":{"a":1}}',
        "entry a number": b'{"a":1}',
        "entry without shape": b'{"a":{"dtype":"F32","data_offsets":[0,4]}}',
    }.items():
        yield name, with_header(text)
    for name, value in {
        "unknown type": entry("F99", [1], 0, 4),
        "type a number": entry(32, [1], 0, 4),  # type: ignore[arg-type]
        "negative size": entry("F32", [-1], 0, 4),
        "size a fraction": entry("F32", [1.0], 0, 4),
        "size true": entry("F32", [True], 0, 4),
        "size too large": entry("F32", [2**62, 2**62], 0, 4),
        "terabytes": entry("F32", [2**40], 0, 2**42),
        "offsets reversed": entry("F32", [1], 4, 0),
        "negative offset": entry("F32", [1], -4, 0),
        "gap": entry("F32", [1], 4, 8),
        "shape and bytes differ": entry("F32", [2], 0, 4),
        "4-bit type": entry("F4", [2, 4], 0, 4),
        "complex type": entry("C64", [1, 1], 0, 8),
    }.items():
        yield name, with_header({f"{Q}.lora_down.weight": value}, b"\0" * 8)
    one = json.dumps(entry("F32", [1], 0, 4))
    yield "key twice", with_header(f'{{"{Q}.alpha":{one},"{Q}.alpha":{one}}}'.encode(), b"\0" * 4)
    two = {f"{Q}.alpha": entry("F32", [1], 0, 4), f"{Q}.lora_up.weight": entry("F32", [1, 1], 0, 4)}
    yield "overlap", with_header(two, b"\0" * 4)
    yield "metadata twice", with_header(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}')


def other_file_cases() -> Iterator[tuple[str, bytes]]:
    for protocol in range(6):
        yield f"pickle {protocol}", pickle.dumps({"a": [1, 2, 3]}, protocol=protocol)
    yield "zip", b"PK\x03\x04" + b"\0" * 100
    yield "web page", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "web page after spaces", b"  \n <html></html>"
    yield "JSON", b'{"error": "not found"}'
    yield "text", b"Invalid username or password."
    yield "GGUF", b"GGUF" + b"\x03\0\0\0" * 20
    yield "LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    yield "zeros", b"\0" * 4096
    yield "0xff", b"\xff" * 4096


def flipped_cases() -> Iterator[tuple[str, bytes]]:
    """One changed character in a name, a type or a shape of the header."""
    whole = content({key: tensor for key, tensor in good().items() if key.startswith(f"{Q}.")})
    length = struct.unpack("<Q", whole[:8])[0]
    text = whole[8 : 8 + length].decode()
    places = [i for i in range(len(text)) if text[i].isalnum()]
    for place in places[:: max(1, len(places) // 30)]:
        changed = text[:place] + ("7" if text[place].isdigit() else "#") + text[place + 1 :]
        if changed != text:
            yield (
                f"flip {place} {text[max(0, place - 8) : place + 4]!r}",
                with_header(changed.encode(), whole[8 + length :]),
            )


def tensor_cases() -> Iterator[tuple[str, bytes]]:
    def changed(name: str, change: Callable[[dict[str, Tensor]], object]) -> tuple[str, bytes]:
        tensors = good()
        change(tensors)
        return name, content(tensors)

    modules = ["attn.to_q", "attn.add_k_proj", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mod.1"]
    for module in modules:
        stem = f"transformer_blocks.0.{module}"
        for role in ("lora_down", "lora_up"):
            key = f"{stem}.{role}.weight"
            yield changed(f"half pair {module} {role}", lambda t, key=key: t.pop(key))
            yield changed(
                f"transposed {module} {role}", lambda t, key=key: t.update({key: t[key].T.contiguous()})
            )
            yield changed(f"flat {module} {role}", lambda t, key=key: t.update({key: t[key].reshape(-1)}))
            yield changed(f"3-d {module} {role}", lambda t, key=key: t.update({key: t[key][None]}))
            yield changed(f"empty {module} {role}", lambda t, key=key: t.update({key: t[key][:0]}))
            yield changed(
                f"integers {module} {role}", lambda t, key=key: t.update({key: t[key].to(torch.int8)})
            )
            for number in (float("nan"), float("inf"), float("-inf")):
                yield changed(
                    f"{number} {module} {role}", lambda t, key=key, n=number: t[key].view(-1)[3].fill_(n)
                )
        down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
        yield changed(
            f"swapped {module}", lambda t, d=down, u=up: t.update({d: t[u].clone(), u: t[d].clone()})
        )
        yield changed(f"other rank {module}", lambda t, d=down: t.update({d: t[d][:3].clone()}))
        yield changed(f"too wide {module}", lambda t, d=down: t.update({d: torch.cat([t[d], t[d]], dim=1)}))
        yield changed(f"too tall {module}", lambda t, u=up: t.update({u: torch.cat([t[u], t[u]])}))
        for alpha in (
            torch.tensor(0.0),
            torch.tensor(float("nan")),
            torch.tensor(float("inf")),
            torch.ones(2),
        ):
            yield changed(f"alpha {alpha} {module}", lambda t, s=stem, a=alpha: t.update({f"{s}.alpha": a}))
    yield changed("fp8 NaN", lambda t: t.update({f"{Q}.lora_up.weight": fp8_nan(t[f"{Q}.lora_up.weight"])}))
    yield changed("no tensors", lambda t: t.clear())
    yield changed("only an alpha", lambda t: [t.pop(key) for key in list(t) if "lora_" in key])


def fp8_nan(tensor: Tensor) -> Tensor:
    result = tensor.to(torch.float8_e4m3fn)
    result.view(torch.uint8)[0, 0] = 0x7F
    return result


def key_cases() -> Iterator[tuple[str, bytes]]:
    factor = torch.ones(4, 64)
    for key in (
        "../../../etc/passwd",
        "/etc/passwd",
        "..\\..\\windows",
        f"../{Q}.lora_down.weight",
        f"{Q}/../to_k.lora_down.weight",
        f"{Q}.lora_down.weight\0",
        "",
        " ",
        "\n",
        "a" * 10_000,
        "üñí.lora_down.weight",
        f"{Q}.lora_down",
        f"{Q}.lora_mid.weight",
        f"{Q}.lokr_t2",
        f"{Q}.weight",
        "model.diffusion_model.input_blocks.0.weight",
        "lora_unet_down_blocks_0_attentions_0.lora_down.weight",
        "double_blocks.0.img_attn.qkv.lora_A.weight",
        "transformer_blocks.999999.attn.to_q.lora_down.weight",
        "bundle_emb.token.default",
    ):
        yield f"key {key[:60]!r}", content({**good(), key: factor})
    for prefix in (
        "transformer.",
        "diffusion_model.",
        "base_model.model.",
        "pipe.dit.",
        "transformer.transformer.",
    ):
        twice = {
            f"{prefix}{Q}.lora_A.weight": torch.zeros(4, 64),
            f"{prefix}{Q}.lora_B.weight": torch.zeros(64, 4),
        }
        yield f"module twice, {prefix}", content({**good(), **twice})
    two = {f"{Q}.lora_A.{name}.weight": factor.clone() for name in ("default", "style")}
    yield "two adapters", content({**two, f"{Q}.lora_B.default.weight": torch.ones(64, 4)})
    yield "LoRA and difference", content({**good(), f"{Q}.diff": torch.ones(64, 64)})
    yield "LoKr twice", content({f"{Q}.lokr_w1": torch.ones(8, 8), f"{Q}.lokr_w1_a": torch.ones(8, 2)})
    yield "many unknown keys", content({f"unknown.{index}": torch.ones(1) for index in range(20_000)})


def metadata_cases() -> Iterator[tuple[str, bytes]]:
    tensors = samples()["diffusers_train_dreambooth_default_targets"].tensors()
    for name, text in {
        "no JSON": "{",
        "a list": "[]",
        "deep": "[" * 100_000,
        "rank 0": '{"transformer.r": 0, "transformer.lora_alpha": 4}',
        "other rank": '{"transformer.r": 8, "transformer.lora_alpha": 4}',
        "alpha text": '{"transformer.r": 4, "transformer.lora_alpha": "4"}',
        "alpha NaN": '{"transformer.r": 4, "transformer.lora_alpha": NaN}',
        "alpha 0": '{"transformer.r": 4, "transformer.lora_alpha": 0}',
        "pattern a list": '{"transformer.r": 4, "transformer.lora_alpha": 4, '
        '"transformer.rank_pattern": [1]}',
        "a slow expression": '{"transformer.r": 4, "transformer.lora_alpha": 4, '
        '"transformer.rank_pattern": {"(a+)+b": 4}}',
    }.items():
        yield f"adapter metadata: {name}", content(tensors, {"lora_adapter_metadata": text})


CASES = [
    *header_cases(),
    *other_file_cases(),
    *flipped_cases(),
    *tensor_cases(),
    *key_cases(),
    *metadata_cases(),
]


def test_there_are_200_cases() -> None:
    assert len(CASES) >= 200
    assert len({name for name, _ in CASES}) == len(CASES)


def test_each_damaged_file_gives_one_clear_error(tmp_path: Path) -> None:
    source, output = tmp_path / "damaged.safetensors", tmp_path / "out.safetensors"
    before = resident_bytes()
    for name, data in CASES:
        source.write_bytes(data)
        with pytest.raises(ValueError) as error:
            convert_lora(source, output, "kohya")
            pytest.fail(f"{name} was accepted")
        message = str(error.value)
        assert 20 < len(message) < MAX_MESSAGE, (name, message)
        assert [path.name for path in tmp_path.iterdir()] == ["damaged.safetensors"], name
    assert resident_bytes() - before < MAX_GROWTH


def resident_bytes() -> int:
    """The largest resident size that this process had so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


@pytest.mark.parametrize("name", [name for name, _ in CASES][::25])
def test_the_command_line_says_it_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "damaged.safetensors"
    source.write_bytes(dict(CASES)[name])
    assert main(["lora", "convert", str(source), str(tmp_path / "out.safetensors"), "--to", "kohya"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("qwenimage: error: ")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"r": 8, "lora_alpha": 8}', "has rank 4, but its adapter_config says 8"),
        ('{"r": 4, "lora_alpha": true}', "must be a number"),
    ],
)
def test_damaged_peft_folders(config: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(ValueError, match="without adapter_model"):
        convert_lora(folder, tmp_path / "out.safetensors", "kohya")
    (folder / "adapter_model.safetensors").write_bytes(content(samples()["peft_adapter_dir"].tensors()))
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        convert_lora(folder, tmp_path / "out.safetensors", "kohya")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{}",
        "[]",
        '{"version": 1}',
        '{"version": 1, "format": "kohya", "sha256": "0", "source": "AAAA"}',
        '{"version": 1, "format": "kohya", "sha256": "0", "source": 5}',
    ],
)
def test_a_damaged_record_is_no_record(record: str, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes(content(good(), {"diffusers_qwenimage.provenance": record}))
    assert convert_lora(source, tmp_path / "out.safetensors", "kohya").comparison.exact
    with pytest.raises(ValueError, match="no record of an original"):
        convert_lora(source, tmp_path / "out2.safetensors", "original")
