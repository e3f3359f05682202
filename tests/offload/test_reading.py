"""Bytes of files go where they belong, however many pieces they come in."""

from pathlib import Path

import pytest
import torch

from diffusers_qwenimage.offload.reading import MOST_VIEWS, Files, Piece, cut, runs_of


def test_more_pieces_than_one_call_takes(tmp_path: Path) -> None:
    content = torch.randint(256, (3 * MOST_VIEWS,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(bytes(content.tolist()))
    memory = torch.zeros(2 * MOST_VIEWS + 5, dtype=torch.uint8)
    with Files() as files:
        files.read(tmp_path / "file", 7, memory.split(1))
    assert torch.equal(memory, content[7 : 7 + memory.numel()])


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with Files() as files, pytest.raises(ValueError, match="ended while it was read"):
        files.read(tmp_path / "file", 2, [torch.zeros(4, dtype=torch.uint8)])


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    def piece(file: str, offset: int, size: int) -> Piece:
        memory = torch.zeros(size, dtype=torch.uint8)
        return Piece(name="weight", file=tmp_path / file, offset=offset, memory=memory)

    pieces = [piece("b", 0, 4), piece("a", 10, 6), piece("a", 0, 10), piece("a", 20, 1)]
    runs = [[(part.file.name, part.offset) for part in run] for run in runs_of(pieces, 16)]
    assert runs == [[("a", 0), ("a", 10)], [("a", 20)], [("b", 0)]]
    assert [[part.offset for part in run] for run in runs_of(pieces, 15)][:2] == [[0], [10]]
    assert [(part.offset, part.memory.numel()) for part in cut(pieces[2], 4)] == [(0, 4), (4, 4), (8, 2)]
