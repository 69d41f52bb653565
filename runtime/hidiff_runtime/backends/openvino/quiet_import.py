"""The library, imported without what it does besides."""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType

_TELEMETRY = "openvino_telemetry"
_importing = threading.Lock()


def openvino() -> ModuleType:
    """Returns the library, which must not report that it was imported.

    Importing OpenVINO (2026.4) forks a process that sends an event to Google Analytics, and keeps a client's number in
    the home folder, wherever the package openvino-telemetry is installed, which it depends on. Where that is missing it
    imports a stub of its own instead, and so it does here. A process that imported it otherwise before stays as it is.

    Raises:
        ImportError: it is not installed.
    """
    with _importing:
        if "openvino" in sys.modules:
            return importlib.import_module("openvino")
        before = sys.modules.get(_TELEMETRY)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # which makes importing it fail
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules[_TELEMETRY]
            if before is not None:
                sys.modules[_TELEMETRY] = before
