"""Which processor this is, as far as it decides how fast an engine runs."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

_MODEL = ("model name", "Model", "Hardware")
_INSTRUCTIONS = ("flags", "Features")


def processor_model() -> str:
    """Returns the processor's name, with a digest of the instructions that it has where the system tells (Linux).

    Virtual machines hide instructions of processors that are called alike.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in text.splitlines())
    found: dict[str, str] = {}
    for name, _, value in lines:
        found.setdefault(name.strip(), value.strip())  # of the first core
    model = next((found[name] for name in _MODEL if found.get(name)), platform.machine())
    instructions = " ".join(sorted(next((found[name] for name in _INSTRUCTIONS if name in found), "").split()))
    return f"{model} ({hashlib.sha256(instructions.encode()).hexdigest()[:8]})"
