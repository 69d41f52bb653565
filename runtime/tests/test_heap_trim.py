"""Memory that a thread freed goes back to the system."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hidiff_runtime import heap_trim

STATUS = Path("/proc/self/status")
MEBIBYTE = 2**20


def resident() -> int:
    """Bytes that this process has in memory."""
    (line,) = (line for line in STATUS.read_text().split("\n") if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.exists() or heap_trim._glibc("malloc_trim") is None, reason="no glibc on Linux")
def test_what_a_thread_freed_is_given_back() -> None:
    kept: list[bytes] = []

    def work() -> None:
        freed = [bytes([number % 256]) * 100_000 for number in range(1000)]
        kept.append(bytes(100_000))  # behind them, so that the C library cannot let go of them by itself
        del freed

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = resident()
    heap_trim.trim_heap()
    assert before - resident() > 50 * MEBIBYTE


def test_where_nothing_can_be_given_back_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap_trim, "_glibc", lambda _name: None)
    heap_trim.trim_heap()
