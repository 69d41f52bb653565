"""Only regular files are read, and no more of them than is due."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hidiff_runtime.format.regular_files import open_regular, read_regular


def device(path: Path) -> None:
    path.symlink_to(os.devnull)


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": device,
    "a socket": listener,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_told_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "it")
    with pytest.raises(OSError, match=f"it is {kind}, not a file"):
        open_regular(tmp_path / "it")


def test_a_pipe_that_takes_the_place_of_a_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    path.write_bytes(b"before")
    real = os.open

    def swapped(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match="it is a named pipe"):
        open_regular(path)


@pytest.mark.parametrize("size", [0, 9, 10])
def test_a_file_is_read_whole(tmp_path: Path, size: int) -> None:
    (tmp_path / "it").write_bytes(b"x" * size)
    assert read_regular(tmp_path / "it", 10) == b"x" * size


def test_a_larger_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="larger than the 10 bytes that are read"):
        read_regular(tmp_path / "it", 10)


def test_a_file_that_claims_no_size_is_bounded_too() -> None:
    """As the files of ``/proc``, which are regular and have a size of 0."""
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("no /proc here")
    with pytest.raises(OSError, match="larger than the 10 bytes"):
        read_regular(path, 10)
