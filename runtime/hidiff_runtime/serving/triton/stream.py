"""The name of the last release for ``decoupled_model.py``, which model repositories that it wrote import."""

from __future__ import annotations

from hidiff_runtime.serving.triton.decoupled_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
