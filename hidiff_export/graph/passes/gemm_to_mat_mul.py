"""Products that OpenVINO compiles fast."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import Declined, Outcome, RewritePass

_STATED = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


class GemmToMatMul(RewritePass):
    """Turns a ``Gemm`` with ``transB`` into a ``MatMul`` with a transposed weight and the addition of its bias.

    It is the same product. OpenVINO (2026.4) opens an engine of SD1.5 with 184 of one kind in twice the time that it
    takes with as many of the other.

    Requires: nothing.
    Ensures: no ``Gemm`` with ``transB`` reads an initializer as its weight but where `declined` says why.
    """

    operators = frozenset({("", "Gemm")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Rewrites one product."""
        tensor, weight, *bias = node.inputs
        if weight is None or not weight.is_initializer():
            return None
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        if {**_STATED, **given} != {**_STATED, "transB": 1}:
            return Declined("it does more than to multiply with a transposed weight")
        product = self.build.op("MatMul", tensor, self.build.op("Transpose", weight, perm=[1, 0]))
        return [self.build.op("Add", product, bias[0]) if bias and bias[0] is not None else product]
