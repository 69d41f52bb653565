"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library is one that can be told to.

    Threads of glibc keep what they freed: hundreds of megabytes after a few large pictures, for as long as they live.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """glibc's ``malloc_trim``; None where there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # musl has none, and Windows no library without a name
        return None
