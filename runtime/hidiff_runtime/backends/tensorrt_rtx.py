"""TensorRT-RTX: engines built ahead for kinds of GPUs, finished on the GPU they run on. What it shares with TensorRT,
which is nearly everything, is in the package `tensorrt`."""

from __future__ import annotations

from hidiff_runtime.backends.protocol import Backend
from hidiff_runtime.backends.tensorrt.device import TensorRtBackend


def backend() -> Backend:
    """Returns this backend."""
    return TensorRtBackend("tensorrt-rtx")
