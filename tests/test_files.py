"""Files are replaced whole, or left as they were."""

import os
import stat
import threading
from pathlib import Path

import pytest

from diffusers_qwenimage.files import replace_file, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_have_the_permissions_of_the_process(tmp_path: Path) -> None:
    expected = tmp_path / "plain"
    expected.touch()
    write_text(tmp_path / "ours", "text")
    assert mode(tmp_path / "ours") == mode(expected)


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_text("old")
    target.chmod(0o600)
    write_text(target, "new")
    assert target.read_text() == "new" and mode(target) == 0o600


def test_the_umask_of_the_process_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads create files at the same time, and would get wrong permissions."""

    def asked(mask: int) -> int:
        raise AssertionError(f"umask({mask})")

    monkeypatch.setattr(os, "umask", asked)
    write_text(tmp_path / "file", "text")


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    texts = [str(number) * 10_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "file", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with replace_file(target) as temporary:
            assert temporary.suffix == ".txt" and temporary.parent == tmp_path
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
