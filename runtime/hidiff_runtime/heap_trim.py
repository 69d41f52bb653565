"""Memory that was freed, given back to the system where the C library is glibc, which keeps it by itself."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

LARGE = 2**20
"""Bytes of memory that the system is asked for, and given back, by themselves."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt``."""


def trim_heap() -> None:
    """Returns freed memory to the system.

    Threads of glibc keep what they freed: hundreds of megabytes after a few large pictures, for as long as they live.
    """
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def trim_heap_after_large_bodies() -> None:
    """Has large pieces of memory given back when they are freed.

    By itself glibc learns from each large piece that is freed to keep those of its size, up to 32 MiB in each thread.
    """
    choose = _glibc("mallopt")
    if choose is not None:
        for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            choose(name, LARGE)


@cache
def _glibc(name: str) -> Any:
    """Returns a function of glibc; None where there is none, as in musl."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
