"""Linear layers that read the checkpoint's own weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.passes.base import (
    Operator,
    Outcome,
    Replacement,
    RewritePass,
    add_constant,
    make,
    produced_by,
    static_shape,
)


class LinearToGemm(RewritePass):
    """Turns a product with a transposed weight, and the addition of its bias, into one ``Gemm`` with ``transB``.

    torch keeps a weight as [out, in]; ``MatMul`` wants [in, out], and ONNX Runtime makes that copy of every weight
    when it loads. ``Gemm`` reads it as it is and adds the bias while at it.

    Requires: shapes known.
    Ensures: no ``MatMul`` reads a transposed weight whose other factor has a known shape.
    """

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "MatMul"), ("", "Add")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Lowers one linear layer, at its last node."""
        if node.op_type == "MatMul":
            return None if _bias_of(node.outputs[0]) else _gemm(node, node, None)
        for product, other in (node.inputs, node.inputs[::-1]):
            matmul = produced_by(product, "MatMul")
            if product is not None and matmul is not None and _bias_of(product) is other:
                return _gemm(node, matmul, other)
        return None


def _bias_of(product: ir.Value) -> ir.Value | None:
    """The initialiser [out] that is added to a product, if that is all that becomes of it."""
    uses = tuple(product.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or product.is_graph_output():
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    shape, biased = static_shape(other), static_shape(product)
    if other is None or not other.is_initializer() or shape is None or biased is None:
        return None
    return other if shape == biased[-1:] else None


def _gemm(node: ir.Node, matmul: ir.Node, bias: ir.Value | None) -> Outcome:
    tensor, factor = matmul.inputs
    transpose = produced_by(factor, "Transpose")
    shape, graph = static_shape(tensor), node.graph
    if tensor is None or transpose is None or shape is None or len(shape) < 2 or graph is None:
        return None
    perm = transpose.attributes.get("perm")
    if perm is not None and tuple(perm.as_ints()) != (1, 0):
        return None
    (weight,) = transpose.inputs
    size = static_shape(weight)
    if weight is None or not weight.is_initializer() or size is None or len(size) != 2:
        return None
    kind = node.outputs[0].type
    rows = (math.prod(shape[:-1]), shape[-1])
    flat = _reshape(graph, tensor, rows, tensor.type)
    inputs = [flat.outputs[0], weight, *([] if bias is None else [bias])]
    gemm = make("Gemm", inputs, {"transB": 1}, shape=(rows[0], size[0]), type=kind)
    back = _reshape(graph, gemm.outputs[0], (*shape[:-1], size[0]), kind)
    return Replacement([back.outputs[0]], [flat, gemm, back])


def _reshape(graph: ir.Graph, value: ir.Value, shape: Sequence[int], kind: ir.TypeProtocol | None) -> ir.Node:
    return make("Reshape", [value, add_constant(graph, np.array(shape, np.int64))], shape=shape, type=kind)
