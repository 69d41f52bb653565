"""What to do about errors of TensorRT that people meet: its words, and the next step."""

from __future__ import annotations

import re

OUT_OF_MEMORY = (
    "Building takes about three times the weights in memory (15.5 GB for SDXL in float16): "
    "close other programs, or build on a larger machine."
)
REPORT = "Report this together with the recipe and the versions that 'hidiff-export doctor' shows."

_KNOWN = {
    r"OutOfMemory|[Oo]ut of memory|bad_alloc|Cannot allocate memory|MemoryError": OUT_OF_MEMORY,
    r"volume.*(exceed|2\^31|too large|INT32_MAX)|exceeds.*2\^31": (
        "A tensor is beyond the 2^31-1 elements TensorRT can count: choose a smaller width, height or batch."
    ),
    r"not supported by a dedicated kernel": (
        "This library has no attention kernel for a head size or type of the graph; choose precision float16 or "
        "bfloat16, or update the library."
    ),
    r"Plugin not found|No importer registered": (
        "This library does not know an operator of the graph: update it, or report the recipe."
    ),
    r"[Tt]iming cache": (
        "The cache of kernel timings is damaged: delete ~/.cache/hidiff-export/timings and run the command again."
    ),
    r"must have same input types": "A graph mixes precisions, which it must not. " + REPORT,
    # Last, because without a driver every other error brings this one along.
    r"cudaError 35|driver version is insufficient": (
        "There is no NVIDIA driver here, or an old one: install it, or build ahead of time for named targets with "
        "backend: tensorrt-rtx and targets: sm89."
    ),
    r"no CUDA-capable device|cudaError 100\b": (
        "There is no NVIDIA GPU here: build ahead of time for named targets with backend: tensorrt-rtx and "
        "targets: sm89."
    ),
}
"""Advice by a pattern of an error's words."""


def advice_for(text: str) -> str:
    """Returns the next step after an error with this text."""
    return next((advice for pattern, advice in _KNOWN.items() if re.search(pattern, text)), REPORT)
