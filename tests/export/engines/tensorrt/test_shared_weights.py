"""Plans in parts: every byte is kept, what they share is stored once, and nothing is lost when writing fails."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hidiff_export.engines.tensorrt import shared_weights
from hidiff_export.engines.tensorrt.shared_weights import ALIGNMENT, PAGE, share_tails
from hidiff_export.errors import StorageError
from hidiff_runtime.backends.tensorrt.mapped_parts import map_parts


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def plans(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"phase{index}.tensorrt-rtx.plan" for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def joined(parts: Sequence[Path]) -> bytes:
    return b"".join(part.read_bytes() for part in parts)


def names(parts: Sequence[Path]) -> list[str]:
    return [part.name for part in parts]


def test_two_plans_become_heads_and_one_tail(tmp_path: Path) -> None:
    tail = noise(200_000, 0)
    contents = (noise(1001, 1) + tail, noise(70_000, 2) + tail)
    paths = plans(tmp_path, *contents)
    parts = share_tails(paths, 100_000)
    assert names(parts[paths[0]]) == ["phase0.tensorrt-rtx.head", "phase0.tensorrt-rtx.tail"]
    assert names(parts[paths[1]]) == ["phase1.tensorrt-rtx.head", "phase0.tensorrt-rtx.tail"]
    assert [joined(parts[path]) for path in paths] == list(contents)
    assert parts[paths[0]][1].stat().st_size == 3 * PAGE + len(contents[0]) % ALIGNMENT
    assert {path.name for path in tmp_path.iterdir()} == {name for path in paths for name in names(parts[path])}


def test_plans_of_another_size_in_the_same_folder_leave_the_first_ones_whole(tmp_path: Path) -> None:
    first = plans(tmp_path, *(noise(10 + index, index) + noise(200_000, 9) for index in range(2)))
    parts = share_tails(first, 100_000)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    others = [tmp_path / f"phase{index}-192x128.tensorrt-rtx.plan" for index in range(2)]
    contents = [noise(10 + index, index) + noise(300_000, 8) for index in range(2)]
    for path, content in zip(others, contents, strict=True):
        path.write_bytes(content)
    others_parts = share_tails(others, 100_000)
    assert [joined(others_parts[path]) for path in others] == contents
    assert {path: path.read_bytes() for path in before} == before
    assert len({*parts.values()} | {*others_parts.values()}) == 4
    # Whatever is of one size begins with the name of one of its graphs, by which it is found where the size goes.
    added = {path.name.partition(".")[0] for path in tmp_path.iterdir() if path not in before}
    assert added == {"phase0-192x128", "phase1-192x128"}


def test_a_third_plan_that_shares_less_does_not_cost_the_other_two_what_they_share(tmp_path: Path) -> None:
    tail, middle = noise(150_000, 0), noise(300_000, 1)
    contents = (noise(999, 2) + middle + tail, noise(50_000, 3) + tail, noise(7, 4) + middle + tail)
    paths = plans(tmp_path, *contents)
    parts = share_tails(paths, 100_000)
    assert [joined(parts[path]) for path in paths] == list(contents)
    assert [len(parts[path]) for path in paths] == [3, 2, 3]
    assert parts[paths[0]][1:] == parts[paths[2]][1:]
    assert parts[paths[0]][1].stat().st_size % PAGE == 0  # so that it can be mapped before the tail
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert stored < 450_000 + 51_006 + 6 * PAGE


@pytest.mark.parametrize(
    "contents",
    [
        (noise(300_000, 0),),
        (noise(300_000, 0), noise(300_000, 1)),
        (noise(300_000, 0) + noise(99_000, 2), noise(300_000, 1) + noise(99_000, 2)),  # less than is worth it
    ],
    ids=["alone", "unlike", "little alike"],
)
def test_plans_that_share_too_little_stay_whole(contents: tuple[bytes, ...], tmp_path: Path) -> None:
    paths = plans(tmp_path, *contents)
    assert share_tails(paths, 100_000) == {path: (path,) for path in paths}
    assert [path.read_bytes() for path in paths] == list(contents)
    assert len(list(tmp_path.iterdir())) == len(contents)


def test_a_plan_that_shares_nothing_is_left_alone_beside_two_that_do(tmp_path: Path) -> None:
    tail = noise(200_000, 0)
    contents = (noise(10, 1) + tail, noise(250_000, 2), noise(20, 3) + tail)
    paths = plans(tmp_path, *contents)
    before = paths[1].stat()
    parts = share_tails(paths, 100_000)
    assert parts[paths[1]] == (paths[1],)
    assert paths[1].stat() == before
    assert [joined(parts[path]) for path in paths] == list(contents)


def test_equal_plans_share_all_but_a_page(tmp_path: Path) -> None:
    content = noise(200_000, 0)
    paths = plans(tmp_path, content, content)
    parts = share_tails(paths, 100_000)
    assert parts[paths[0]][1:] == parts[paths[1]][1:] == (tmp_path / "phase0.tensorrt-rtx.tail",)
    assert parts[paths[0]][0].stat().st_size < PAGE
    assert joined(parts[paths[0]]) == joined(parts[paths[1]]) == content


def test_a_constant_of_one_phase_in_the_midst_of_the_weights_is_its_own_part(tmp_path: Path) -> None:
    before, after = noise(400_000, 0), noise(500_000, 1)
    contents = [noise(1001 + index, 2 + index) + before + noise(100, 5 + index) + after for index in range(3)]
    contents[2] = noise(99, 9) + before + contents[0][-500_100:]  # the first one's constant
    paths = plans(tmp_path, *contents)
    parts = share_tails(paths, 100_000)
    assert [joined(parts[path]) for path in paths] == contents
    assert names(parts[paths[1]]) == [
        "phase1.tensorrt-rtx.head",
        "phase0.tensorrt-rtx.tail",
        "phase1.tensorrt-rtx.head-2",
        "phase0.tensorrt-rtx.tail-2",
    ]
    assert all(path.stat().st_size % PAGE == 0 for path in parts[paths[1]][1:3])
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert stored < 900_000 + 12 * PAGE


def test_bytes_that_stand_elsewhere_are_not_taken_for_the_same(tmp_path: Path) -> None:
    tail = noise(300_000, 0)
    contents = (tail, tail + b"!")
    paths = plans(tmp_path, *contents)
    assert share_tails(paths, 100_000) == {path: (path,) for path in paths}


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_whatever_plans_share_they_are_kept_to_the_byte(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Plans are random walks through a small tree of pieces, from the end."""
    sizes = st.integers(0, 3 * PAGE)
    shared = [noise(data.draw(sizes), seed) for seed in range(3)]
    contents = []
    for index in range(data.draw(st.integers(1, 4))):
        kept = data.draw(st.integers(0, 3))
        contents.append(noise(data.draw(st.integers(1, 1000)), 10 + index) + b"".join(reversed(shared[:kept])))
    folder = tmp_path_factory.mktemp("plans")
    paths = plans(folder, *contents)
    parts = share_tails(paths, data.draw(st.integers(1, 2 * PAGE)))
    for path, content in zip(paths, contents, strict=True):
        view = map_parts(parts[path])
        assert view == content
        view.release()
    stored = sum(path.stat().st_size for path in folder.iterdir())
    assert set(folder.iterdir()) == {part for each in parts.values() for part in each}
    assert stored <= sum(map(len, contents))


@pytest.mark.parametrize("where", [-1, -ALIGNMENT, -PAGE, -3 * PAGE, 1000])
def test_one_flipped_bit_is_kept(where: int, tmp_path: Path) -> None:
    content = noise(20 * PAGE + 17, 0)
    changed = bytearray(content)
    changed[where] ^= 1
    paths = plans(tmp_path, content, bytes(changed))
    parts = share_tails(paths, 2 * PAGE)
    assert len(parts[paths[0]]) > 1
    assert joined(parts[paths[0]]) == content
    assert joined(parts[paths[1]]) == changed


class Failing:
    """Stands for the copy of a piece: works ``good`` times, then fails half way."""

    def __init__(self, good: int, error: BaseException) -> None:
        self.good, self.error, self.copy = good, error, shared_weights._copy

    def __call__(self, source: Path, begin: int, end: int, writer: BinaryIO) -> None:
        if not self.good:
            writer.write(b"half")
            raise self.error
        self.good -= 1
        self.copy(source, begin, end, writer)


@pytest.mark.parametrize("good", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "due"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), StorageError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "interrupted"],
)
def test_plans_stay_whole_when_writing_fails(
    good: int, error: BaseException, due: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = noise(200_000, 0)
    contents = (noise(1001, 1) + tail, noise(70_000, 2) + tail)
    paths = plans(tmp_path, *contents)
    monkeypatch.setattr(shared_weights, "_copy", Failing(good, error))
    with pytest.raises(due):
        share_tails(paths, 100_000)
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_bytes() for path in paths] == list(contents)
    monkeypatch.undo()
    parts = share_tails(paths, 100_000)  # and may be tried again
    assert [joined(parts[path]) for path in paths] == list(contents)


def test_no_plan_is_removed_before_all_parts_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = noise(200_000, 0)
    paths = plans(tmp_path, noise(1001, 1) + tail, noise(70_000, 2) + tail)
    seen = []
    unlink = Path.unlink

    def watch(path: Path, missing_ok: bool = False) -> None:
        seen.append((path.name, sorted(entry.name for entry in tmp_path.iterdir())))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watch)
    parts = share_tails(paths, 100_000)
    due = {name for path in paths for name in names(parts[path])}
    assert [name for name, _ in seen] == names(paths)
    assert all(due <= set(there) for _, there in seen)


def test_memory_does_not_grow_with_the_plans(tmp_path: Path) -> None:
    tail = bytes(48 << 20)
    paths = plans(tmp_path, b"one" + tail, b"other" + tail)
    del tail
    tracemalloc.start()
    try:
        parts = share_tails(paths)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(parts[paths[0]]) == 2
    assert peak < 24 << 20


def test_the_first_plan_is_aligned_in_memory(tmp_path: Path) -> None:
    tail = noise(200_000, 0)
    paths = plans(tmp_path, noise(1001, 1) + tail, noise(70_000, 2) + tail)
    view = map_parts(share_tails(paths, 100_000)[paths[0]])
    assert np.frombuffer(view, np.uint8).ctypes.data % 64 == 0
