"""ONNX's types of numbers, by the names that the runtime's table has for them."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_runtime.format.dtypes import BY_NAME

ONNX_DTYPES = {name: ir.DataType[known.onnx] for name, known in BY_NAME.items()}
DTYPE_NAMES = {dtype: name for name, dtype in ONNX_DTYPES.items()}
