"""Memory that large bodies took goes back to the system once they are gone."""

from __future__ import annotations

import ctypes
import sys

LARGE = 2**20
"""Bytes of memory that the system is asked for, and given back, by themselves."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt``."""


def trim_heap_after_large_bodies() -> None:
    """Has large pieces of memory given back when they are freed, where the C library is glibc.

    By itself it learns from each large piece that is freed to keep those of its size, up to 32 MiB in each thread.
    """
    choose = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if choose is not None:
        for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            choose(name, LARGE)
