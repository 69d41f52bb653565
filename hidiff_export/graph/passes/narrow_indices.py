"""Gathering with the 32-bit indices that are there, rather than with 64-bit copies of them."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import Outcome, RewritePass, produced_by


class NarrowIndices(RewritePass):
    """Removes the cast from int32 to int64 before a ``Gather``, which takes both.

    The exporter widens every index; TensorRT has no 64-bit gather of its own and warns of it.

    Requires: types known.
    Ensures: the same elements are gathered.
    """

    operators = frozenset({("", "Gather")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Gathers by what the cast was given."""
        data, indices = node.inputs
        cast = produced_by(indices, "Cast")
        if cast is None or cast.inputs[0] is None or cast.inputs[0].dtype != ir.DataType.INT32:
            return None
        return [self.build.copy(node, data, cast.inputs[0])]
