"""Pages of a mapped file leave the process's memory while somebody reads them, and are the file's as before."""

from __future__ import annotations

import mmap
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hidiff_runtime.backends.openvino import released_pages as module
from hidiff_runtime.backends.openvino.released_pages import released_pages

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="Linux' memory alone is told")]

SIZE = 32 * 2**20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "a store.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def mapped(store: Path) -> Iterator[mmap.mmap]:
    with store.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as found:
        yield found


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)
    found = [part for part in parts if part.split("\n", 1)[0].endswith(str(path))]
    return sum(int(size) * 1024 for part in found for size in re.findall(r"(?m)^Rss:\s+(\d+)", part))


def test_what_was_read_is_let_go_of(store: Path, mapped: mmap.mmap) -> None:
    content = mapped[:]
    assert resident(store) == SIZE
    with released_pages([store]):
        pass
    assert resident(store) == 0
    assert mapped[:] == content


def test_it_is_let_go_of_all_the_while(store: Path, mapped: mmap.mmap) -> None:
    with released_pages([store]):
        for _ in range(3):
            assert len(mapped[:]) == SIZE
            while resident(store):
                assert any(thread.name == "released-pages" for thread in threading.enumerate())
    assert not any(thread.name == "released-pages" for thread in threading.enumerate())


def test_other_files_stay(store: Path, mapped: mmap.mmap, tmp_path: Path) -> None:
    assert len(mapped[:]) == SIZE
    with released_pages([tmp_path / "another.safetensors"]):
        pass
    assert resident(store) == SIZE


def test_pages_that_somebody_may_have_changed_stay(store: Path) -> None:
    with store.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as private:
        private[:4] = b"mine"
        with released_pages([store]):
            pass
        assert private[:4] == b"mine"


def test_links_are_followed(store: Path, mapped: mmap.mmap, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store)
    assert len(mapped[:]) == SIZE
    with released_pages([tmp_path / "link"]):
        pass
    assert resident(store) == 0


def test_nothing_happens_elsewhere(store: Path, mapped: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(mapped[:]) == SIZE
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with released_pages([store]):
        pass
    assert resident(store) == SIZE
