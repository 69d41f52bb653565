"""What a measurement was taken on: processor, cores, instructions that matter, memory and versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from hidiff_export.tool_versions import tool_versions
from hidiff_runtime.backends.processor_cores import usable_cores

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve")
_LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "hidiffusion", "numpy")


def machine_facts(threads: int) -> dict[str, Any]:
    """Returns facts by name, as JSON types; ``memory`` in bytes, ``threads`` those of an evaluation."""
    facts = _processor_facts()
    flags = (facts.get("flags") or facts.get("Features", "")).split()
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "threads": threads,
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": tool_versions(_LIBRARIES),
    }


def _processor_facts() -> dict[str, str]:
    """Returns what Linux says of the first core; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
