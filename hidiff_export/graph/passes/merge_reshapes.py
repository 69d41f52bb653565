"""One reshape, or none, for two in a row."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.passes.base import Outcome, RewritePass, constant, static_shape

_SHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


class MergeReshapes(RewritePass):
    """Lets a ``Reshape`` read what came before other changes of shape, and drops it where it gives that shape back.

    Requires: static shapes.
    Ensures: no ``Reshape`` to a constant shape without 0 and -1 reads another change of shape.
    """

    operators = frozenset({("", "Reshape")})

    def rewrite(self, node: ir.Node) -> Outcome:
        """Merges ``node`` into what it reads."""
        target, wanted = static_shape(node.outputs[0]), constant(node.inputs[1])
        source = node.inputs[0]
        if target is None or wanted is None or source is None:
            return None
        while (before := source.producer()) is not None and before.domain == "" and before.op_type in _SHAPING:
            assert before.inputs[0] is not None  # each of them requires its first input
            source = before.inputs[0]
        if static_shape(source) == target:
            return [source]
        if source is node.inputs[0] or not all(size > 0 for size in wanted):
            return None
        return [self.build.op("Reshape", source, node.inputs[1])]
