"""Folding of what can be computed while building, without touching a weight."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir

LARGEST_RESULT = 4096
"""Elements of the largest tensor that folding may make."""


class FoldConstants(ir.passes.InPlacePass):
    """Computes nodes whose inputs are constants, and replaces sequences by plain tensors.

    onnxscript's folding also turns ``SplitToSequence`` and ``SequenceAt`` into ``Split``. Nodes that read a weight are
    kept as they are: a transposed or otherwise computed copy of a weight would no longer be the checkpoint's bytes.

    Requires: a graph as torch's exporter makes it, shapes known.
    Ensures: no operator on sequences is left, and every weight is read as it was.

    Args:
        weights: names of the initializers that are weights.
    """

    def __init__(self, weights: Collection[str]) -> None:
        super().__init__()
        self._weights = frozenset(weights)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds in place."""
        result = fold_constants_ir(
            model, onnx_shape_inference=True, output_size_limit=LARGEST_RESULT, should_fold=self._should_fold
        )
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, result.modified)

    def _should_fold(self, node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in self._weights for value in node.inputs) else None

    def ensures(self, model: ir.Model) -> None:
        """Checks that no sequence is left."""
        for node in model.graph:
            if "Sequence" in node.op_type:
                raise ir.passes.PostconditionError(f"{node.op_type} {node.name} works on a sequence")
