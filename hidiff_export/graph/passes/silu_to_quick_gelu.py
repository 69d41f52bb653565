"""SiLU in one operator."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import MICROSOFT, Outcome, RewritePass, produced_by


class SiluToQuickGelu(RewritePass):
    """Turns ``x * Sigmoid(x)`` into ``com.microsoft.QuickGelu`` with alpha 1, which is the same function.

    Requires: nothing.
    Ensures: no product of a value and its own sigmoid is left.
    """

    operators = frozenset({("", "Mul")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Joins one product and its sigmoid."""
        for factor, other in (node.inputs, node.inputs[::-1]):
            sigmoid = produced_by(other, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] is factor:
                return [self.build.op("QuickGelu", factor, domain=MICROSOFT, alpha=1.0)]
        return None
