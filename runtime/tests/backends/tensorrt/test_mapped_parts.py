"""One piece of memory over several files: the bytes, what of them is a copy, when it goes away, and broken parts."""

from __future__ import annotations

import gc
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hidiff_runtime.backends.tensorrt import mapped_parts
from hidiff_runtime.backends.tensorrt.mapped_parts import map_parts
from hidiff_runtime.errors import EngineError

PAGE = mmap.PAGESIZE
MEGABYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def files(folder: Path, *sizes: int) -> list[Path]:
    """Files of random bytes."""
    paths = [folder / f"part{index}" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def content(paths: Sequence[Path]) -> bytes:
    return b"".join(path.read_bytes() for path in paths)


def mappings(path: Path) -> list[dict[str, int]]:
    """Every mapping of a file into this process: its figures in kB, from the kernel."""
    found = []
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if block.partition("\n")[0].endswith(f" {path}"):
            found.append({name: int(size) for name, size in re.findall(r"(?m)^(\w+): +(\d+) kB", block)})
    return found


SPLITS = [
    (5 * PAGE + 3,),
    (1, 1),
    (1, 3 * PAGE),
    (PAGE, PAGE),
    (PAGE - 1, 2 * PAGE + 17),
    (3 * PAGE + 5, 1),
    (PAGE + 7, 16 * PAGE, 2 * PAGE + 1),
    (100, 33, 7 * PAGE + 9),  # the one between fills no pages, so it is read
    (PAGE, 4 * PAGE, PAGE, 5),
]


@pytest.mark.parametrize("placed", [True, False], ids=["placed", "read"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_view_is_the_files_one_after_another(
    sizes: tuple[int, ...], placed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_parts, "_CAN_PLACE", placed and mapped_parts._CAN_PLACE)
    paths = files(tmp_path, *sizes)
    view = map_parts(paths)
    assert (view.contiguous, view.readonly, view.itemsize, view.nbytes) == (True, True, 1, sum(sizes))
    assert view == content(paths)


@linux
def test_the_tail_is_mapped_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = files(tmp_path, 300_001, 2 * MEGABYTE, 48 * MEGABYTE + 11)
    view = map_parts(paths)
    assert view == content(paths)  # which touches every page
    for path in paths[1:]:
        (mapped,) = mappings(path)
        assert mapped["Rss"] * 1024 >= path.stat().st_size
        assert mapped["Anonymous"] == 0
    assert mappings(paths[0]) == []
    del view
    monkeypatch.setattr(mapped_parts, "_CAN_PLACE", False)
    copied = map_parts(paths)
    assert copied == content(paths)
    assert [mappings(path) for path in paths] == [[], [], []]  # the measure does see a copy


GROWTH = """
import sys
from pathlib import Path
from hidiff_runtime.backends.tensorrt import mapped_parts
def anonymous_kb():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])
mapped_parts._CAN_PLACE = mapped_parts._CAN_PLACE and sys.argv[1] == "placed"
before = anonymous_kb()
view = mapped_parts.map_parts([Path(path) for path in sys.argv[2:]])
sum(view[::4096])
print(anonymous_kb() - before)
"""
"""Run by an interpreter of its own: in one that has run before, a copy may lie in memory that was freed."""


@linux
def test_a_mapped_tail_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    paths = files(tmp_path, 300_001, 2 * MEGABYTE, 48 * MEGABYTE + 11)

    def growth(way: str) -> int:
        command = [sys.executable, "-c", GROWTH, way, *map(str, paths)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert growth("placed") < 4096
    assert growth("read") > 48 * 1024


@linux
def test_everything_is_unmapped_with_the_last_view(tmp_path: Path) -> None:
    paths = files(tmp_path, 100, 40 * PAGE)
    view = map_parts(paths)
    cut = view[50:200]
    view.release()
    del view
    assert len(mappings(paths[1])) == 1
    assert bytes(cut) == content(paths)[50:200]
    cut.release()
    del cut
    gc.collect()
    assert mappings(paths[1]) == []


def test_the_view_outlives_the_files_names(tmp_path: Path) -> None:
    paths = files(tmp_path, 100, 3 * PAGE)
    whole = content(paths)
    view = map_parts(paths)
    for path in paths:
        path.unlink()
    assert view == whole


def test_a_flipped_byte_shows(tmp_path: Path) -> None:
    paths = files(tmp_path, 100, 3 * PAGE)
    whole = content(paths)
    for path in paths:
        original = path.read_bytes()
        path.write_bytes(original[:50] + bytes([original[50] ^ 1]) + original[51:])
        assert map_parts(paths) != whole
        path.write_bytes(original)
    assert map_parts(paths) == whole
    assert map_parts([paths[1], paths[0]]) != whole


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_part_is_named(index: int, placed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_parts, "_CAN_PLACE", placed)
    paths = files(tmp_path, 100, PAGE)
    paths[index].unlink()
    with pytest.raises(EngineError, match="cannot be read") as caught:
        map_parts(paths)
    assert paths[index].name in str(caught.value)


@pytest.mark.parametrize("index", [0, 1])
def test_an_empty_part_is_refused(index: int, tmp_path: Path) -> None:
    paths = files(tmp_path, 100, PAGE)
    paths[index].write_bytes(b"")
    with pytest.raises(EngineError, match="is empty") as caught:
        map_parts(paths)
    assert paths[index].name in str(caught.value)


@linux
def test_a_refusal_of_the_system_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "PROT_READ", mmap.PROT_READ | mmap.PROT_WRITE)  # of files open for reading alone
    paths = files(tmp_path, 100, 3 * PAGE)
    with pytest.raises(EngineError, match="cannot be read") as caught:
        map_parts(paths)
    assert paths[1].name in str(caught.value)
    assert mappings(paths[1]) == []
