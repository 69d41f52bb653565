"""ONNX's types of numbers, by the names that the runtime's table has for them."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from hidiff_runtime.format.dtypes import BY_NAME

ONNX_DTYPES = {name: ir.DataType[known.onnx] for name, known in BY_NAME.items()}
DTYPE_NAMES = {dtype: name for name, dtype in ONNX_DTYPES.items()}


def signature(values: Iterable[ir.Value]) -> list[tuple[str | None, tuple[object, ...], str | None]]:
    """Lists name, shape and type of a graph's inputs or outputs; what is not known is empty, and None."""
    return [
        (value.name, tuple(value.shape or ()), DTYPE_NAMES.get(value.dtype or ir.DataType.UNDEFINED))
        for value in values
    ]
