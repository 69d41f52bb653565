"""Files that are there whole, as they were before, or not at all."""

import os
import stat
from pathlib import Path

import pytest

from hidiff_runtime.format.atomic_write import atomic_write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
        assert len(names(tmp_path)) == 1
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("beside", [None, "a.bin.tmp"])
def test_a_block_that_fails_leaves_the_older_file_alone(beside: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_write(path, beside=None if beside is None else tmp_path / beside) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.bin.tmp").write_bytes(b"a longer half")
    with atomic_write(tmp_path / "a.bin", beside=tmp_path / "a.bin.tmp") as file:
        file.write(b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("refuses", ["fsync", "replace"])
def test_a_disk_that_refuses_at_the_end_leaves_nothing(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    owner: object = os if refuses == "fsync" else Path
    monkeypatch.setattr(owner, refuses, refuse)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("options", "expected"), [({}, 0o644), ({"permissions": 0o600}, 0o600)])
def test_permissions_are_those_asked_less_the_umask(options: dict[str, int], expected: int, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a.bin", **options) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == expected


def test_a_name_as_long_as_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
