"""How many cores of the processor there are for this process."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Returns those that this process may use, where the system tells (Linux); else the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
