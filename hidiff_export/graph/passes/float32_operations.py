"""Float32 where a graph of 16-bit types needs it."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.float32_ops import FLOAT32_OPERATIONS, Means, float32_operation_of
from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.base import Outcome, RewritePass

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""Types of 16 bits."""

_STASH_TYPE = "stash_type"
_FLOAT = int(ir.DataType.FLOAT)


class Float32Operations(RewritePass):
    """Applies :data:`~hidiff_export.graph.float32_ops.FLOAT32_OPERATIONS`.

    Requires: types known.
    Ensures: every operator of the table computes in float32.
    """

    operators = frozenset(("", name) for operation in FLOAT32_OPERATIONS for name in operation.operators)

    def rewrite(self, node: ir.Node) -> Outcome:
        """Makes one node compute in float32."""
        if computes_in_float32(node):
            return None
        operation = float32_operation_of(node.op_type)
        assert operation is not None  # by `operators`
        return between_casts(self.build, node) if operation.means is Means.CASTS else None

    def ensures(self, model: ir.Model) -> None:
        """Checks the graph against the table."""
        for node in model.graph:
            operation = float32_operation_of(node.op_type)
            if operation is not None and not node.domain and not computes_in_float32(node):
                raise ir.passes.PostconditionError(
                    f"{node.op_type} {node.name} is of {node.inputs[0].dtype if node.inputs[0] else None}, but in "
                    f"{operation.name} {operation.means.value}"
                )


def computes_in_float32(node: ir.Node) -> bool:
    """Says whether a node of the table computes in float32 or more, by its types and attributes."""
    operation = float32_operation_of(node.op_type)
    if operation is not None and operation.means is Means.KERNELS:
        stash_type = node.attributes.get(_STASH_TYPE)
        return stash_type is None or stash_type.as_int() == _FLOAT  # float32 is ONNX's default
    return all(value is None or value.dtype not in HALVES for value in node.inputs)


def between_casts(build: NodeBuilder, node: ir.Node) -> list[ir.Value]:
    """Makes the node in float32: its 16-bit inputs cast, and its output cast back."""
    inputs = [
        build.cast(value, ir.DataType.FLOAT) if value is not None and value.dtype in HALVES else value
        for value in node.inputs
    ]
    (narrow,) = node.outputs
    assert narrow.dtype is not None  # known where the inputs' types are
    return [build.cast(build.copy(node, *inputs), narrow.dtype)]
