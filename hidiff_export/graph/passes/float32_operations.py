"""Float32 where a graph of 16-bit types needs it."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from hidiff_export.graph.float32_ops import FLOAT32_OPERATIONS, Means, float32_operation_of
from hidiff_export.graph.passes.base import Operator, Outcome, Replacement, RewritePass, make

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""Types of 16 bits."""

_STASH_TYPE = "stash_type"
_FLOAT = int(ir.DataType.FLOAT)


class Float32Operations(RewritePass):
    """Applies :data:`~hidiff_export.graph.float32_ops.FLOAT32_OPERATIONS`.

    Requires: types known.
    Ensures: every operator of the table computes in float32.
    """

    operators: ClassVar[frozenset[Operator]] = frozenset(
        ("", name) for island in FLOAT32_OPERATIONS for name in island.operators
    )

    def rewrite(self, node: ir.Node) -> Outcome:
        """Makes one node compute in float32."""
        if computes_in_float32(node):
            return None
        island = float32_operation_of(node.op_type)
        assert island is not None  # by `operators`
        return between_casts(node) if island.means is Means.CASTS else None

    def ensures(self, model: ir.Model) -> None:
        """Checks the graph against the table."""
        for node in model.graph:
            island = float32_operation_of(node.op_type)
            if island is not None and not node.domain and not computes_in_float32(node):
                raise ir.passes.PostconditionError(
                    f"{node.op_type} {node.name} is of {node.inputs[0].dtype if node.inputs[0] else None}, but in "
                    f"{island.name} {island.means.value}"
                )


def computes_in_float32(node: ir.Node) -> bool:
    """Whether a node of the table computes in float32 or more, by its types and attributes."""
    island = float32_operation_of(node.op_type)
    if island is not None and island.means is Means.KERNELS:
        stash_type = node.attributes.get(_STASH_TYPE)
        return stash_type is None or stash_type.as_int() == _FLOAT  # float32 is ONNX's default
    return all(value is None or value.dtype not in HALVES for value in node.inputs)


def between_casts(node: ir.Node) -> Replacement:
    """The node in float32: its 16-bit inputs cast, and its output cast back."""
    nodes, inputs = [], []
    wide = ir.TensorType(ir.DataType.FLOAT)
    for value in node.inputs:
        if value is not None and value.dtype in HALVES:
            nodes.append(make("Cast", [value], {"to": ir.DataType.FLOAT}, shape=value.shape, type=wide))
            value = nodes[-1].outputs[0]
        inputs.append(value)
    (narrow,) = node.outputs
    assert narrow.dtype is not None  # known where the inputs' types are
    nodes.append(make(node.op_type, inputs, dict(node.attributes), shape=narrow.shape, type=wide))
    back = make("Cast", [nodes[-1].outputs[0]], {"to": narrow.dtype}, shape=narrow.shape, type=narrow.type)
    return Replacement(back.outputs, [*nodes, back])
