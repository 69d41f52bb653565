"""The backends by name, the one to be preferred first. Each is imported when it is asked for."""

from __future__ import annotations

from hidiff_runtime.backends.protocol import Backend
from hidiff_runtime.errors import InputError

NAMES = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""Every backend, the one to be preferred first."""


def get(name: str) -> Backend:
    """Returns the backend called ``name``; its library need not be installed.

    Raises:
        InputError: there is no such backend.
    """
    if name not in NAMES:
        raise InputError("There is no such backend.", given=name, advice=f"Use one of {', '.join(NAMES)}.")
    if name == "onnxruntime":
        from hidiff_runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    from hidiff_runtime.backends.tensorrt.device import TensorRtBackend

    return TensorRtBackend(name)
