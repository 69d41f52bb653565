"""Libraries that only some uses need, imported when one begins."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from hidiff_runtime.errors import EngineError


def optional_library(module: str, need: str, advice: str) -> ModuleType:
    """Returns a module of an optional library.

    Args:
        module: its name.
        need: what needs which library, as messages begin: ``Pictures need Pillow``.
        advice: what installs it.

    Raises:
        EngineError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(f"{need}, which is not installed.", given=error, advice=advice) from error
