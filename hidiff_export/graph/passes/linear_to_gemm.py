"""Linear layers that read the checkpoint's own weights."""

from __future__ import annotations

import math

import onnx_ir as ir

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.base import Outcome, RewritePass, produced_by, static_shape


class LinearToGemm(RewritePass):
    """Turns a product with a transposed weight, and the addition of its bias, into one ``Gemm`` with ``transB``.

    torch keeps a weight as [out, in]; ``MatMul`` wants [in, out], and ONNX Runtime makes that copy of every weight
    when it loads. ``Gemm`` reads it as it is and adds the bias while at it.

    Requires: shapes known.
    Ensures: no ``MatMul`` reads a transposed weight whose other factor has a known shape.
    """

    operators = frozenset({("", "MatMul"), ("", "Add")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Lowers one linear layer, at its last node."""
        if node.op_type == "MatMul":
            return None if _bias_of(node.outputs[0]) else _gemm(self.build, node, None)
        for product, other in (node.inputs, node.inputs[::-1]):
            matmul = produced_by(product, "MatMul")
            if product is not None and matmul is not None and _bias_of(product) is other:
                return _gemm(self.build, matmul, other)
        return None


def _bias_of(product: ir.Value) -> ir.Value | None:
    """Finds the initializer [out] that is added to a product, if that is all that becomes of it."""
    uses = tuple(product.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or product.is_graph_output():
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    shape, biased = static_shape(other), static_shape(product)
    if other is None or not other.is_initializer() or shape is None or biased is None:
        return None
    return other if shape == biased[-1:] else None


def _gemm(build: NodeBuilder, matmul: ir.Node, bias: ir.Value | None) -> Outcome:
    tensor, factor = matmul.inputs
    transpose = produced_by(factor, "Transpose")
    shape = static_shape(tensor)
    if transpose is None or shape is None or len(shape) < 2:
        return None
    perm = transpose.attributes.get("perm")
    if perm is not None and tuple(perm.as_ints()) != (1, 0):
        return None
    (weight,) = transpose.inputs
    size = static_shape(weight)
    if weight is None or not weight.is_initializer() or size is None or len(size) != 2:
        return None
    flat = build.reshape(tensor, (math.prod(shape[:-1]), shape[-1]))
    gemm = build.op("Gemm", flat, weight, *([] if bias is None else [bias]), transB=1)
    return [build.reshape(gemm, (*shape[:-1], size[0]))]
