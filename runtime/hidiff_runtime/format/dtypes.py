"""Types of numbers: what numpy, safetensors, ONNX and TensorRT each call them."""

from __future__ import annotations

from typing import NamedTuple


class NumberType(NamedTuple):
    """A type of number.

    Args:
        name: numpy's and PyTorch's.
        tag: safetensors'.
        onnx: the name in ONNX's ``TensorProto.DataType``.
        tensorrt: the name in TensorRT's ``DataType``, whether it has it or not.
    """

    name: str
    tag: str
    onnx: str
    tensorrt: str

    @property
    def onnxruntime(self) -> str:
        """What ONNX Runtime calls a tensor of it: ``tensor(float)``."""
        return f"tensor({self.onnx.lower()})"


_TYPES = (
    NumberType("float64", "F64", "DOUBLE", "DOUBLE"),
    NumberType("float32", "F32", "FLOAT", "FLOAT"),
    NumberType("float16", "F16", "FLOAT16", "HALF"),
    NumberType("bfloat16", "BF16", "BFLOAT16", "BF16"),
    NumberType("int64", "I64", "INT64", "INT64"),
    NumberType("int32", "I32", "INT32", "INT32"),
    NumberType("int16", "I16", "INT16", "INT16"),
    NumberType("int8", "I8", "INT8", "INT8"),
    NumberType("uint64", "U64", "UINT64", "UINT64"),
    NumberType("uint32", "U32", "UINT32", "UINT32"),
    NumberType("uint16", "U16", "UINT16", "UINT16"),
    NumberType("uint8", "U8", "UINT8", "UINT8"),
    NumberType("bool", "BOOL", "BOOL", "BOOL"),
)

BY_NAME = {known.name: known for known in _TYPES}
"""Every type by numpy's name."""

BY_TAG = {known.tag: known for known in _TYPES}
"""Every type by safetensors' tag."""
