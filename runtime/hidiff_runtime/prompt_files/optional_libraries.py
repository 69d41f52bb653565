"""Libraries that some endings need, imported when one is read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hidiff_runtime.errors import EngineError

_INSTALLED_BY = {"pyarrow": "pip install 'hidiff-runtime[bulk]'", "yaml": "pip install pyyaml"}


def library(module: str, ending: str) -> Any:
    """Returns a module of an optional library.

    Raises:
        EngineError: it is not installed; what installs it is named.
    """
    root = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        called = {"yaml": "PyYAML"}.get(root, root)
        raise EngineError(
            f"Prompts in {ending} need {called}, which is not installed.",
            given=error,
            advice=f"{_INSTALLED_BY[root]}. Or write them as .jsonl.",
        ) from error
