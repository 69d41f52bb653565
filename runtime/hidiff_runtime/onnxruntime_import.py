"""ONNX Runtime, imported without what it does besides."""

from __future__ import annotations

import os
from types import ModuleType
from typing import cast

SWITCH = "ORT_DISABLE_TELEMETRY"
"""The variable that ONNX Runtime looks at before it reports."""


def onnxruntime() -> ModuleType:
    """Returns the library, which must not report who uses it.

    With its first session ONNX Runtime (1.32, as it comes from PyPI, on Linux too) starts a client of Microsoft's
    telemetry: it keeps a device's number and a database of events in the home folder, and looks for the collector. What
    the variable is set to already stays.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault(SWITCH, "1")
    import onnxruntime as library

    return cast(ModuleType, library)
