"""The compiler's errors: the runtime's, and those that only building can meet."""

from __future__ import annotations

from hidiff_runtime.errors import (
    BundleError,
    Cancelled,
    EngineError,
    HidiffError,
    InputError,
    ParityError,
    StorageError,
)

__all__ = [
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "HidiffError",
    "InputError",
    "ParityError",
    "RecipeError",
    "StorageError",
]


class RecipeError(InputError):
    """A recipe has an unknown key, a wrong type or a value that cannot work."""


class CheckpointError(HidiffError):
    """A checkpoint is missing, truncated, of another family, holds NaN, or computes more than float16 holds."""

    exit_code = 3


class ExportError(HidiffError):
    """Tracing or a graph pass failed."""

    exit_code = 5
