"""The name of the last release for ``unary_model.py``, which model repositories that it wrote import."""

from __future__ import annotations

from hidiff_runtime.serving.triton.unary_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
