"""One transposition, or none, for two in a row."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import Outcome, RewritePass, produced_by


class MergeTransposes(RewritePass):
    """Joins a ``Transpose`` with the one before it, and drops both where they cancel.

    Requires: the order of axes written out, as torch.onnx does; one left to the default is left alone.
    Ensures: no ``Transpose`` with an order reads another one.
    """

    operators = frozenset({("", "Transpose")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Merges ``node`` into what it reads."""
        before = produced_by(node.inputs[0], "Transpose")
        if before is None or "perm" not in node.attributes or "perm" not in before.attributes:
            return None
        (source,) = before.inputs
        assert source is not None  # a transposition's only input is required
        first, second = before.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
        order = [first[axis] for axis in second]
        if order == sorted(order):
            return [source]
        return [self.build.op("Transpose", source, perm=order)]
