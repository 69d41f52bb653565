"""One place for constants: initialisers, each content once."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

_SMALL = 1024


class CollectConstants(ir.passes.InPlacePass):
    """Turns ``Constant`` nodes into initialisers and keeps one of equal small ones.

    Requires: nothing.
    Ensures: no ``Constant`` node is left but one that is an output of the graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Collects in place."""
        steps = ir.passes.Sequential(
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(size_limit=_SMALL),
        )
        return ir.passes.PassResult(model, steps(model).modified)

    def ensures(self, model: ir.Model) -> None:
        """Checks that no node inside the graph is a constant."""
        for node in model.graph:
            if node.op_type == "Constant" and not node.outputs[0].is_graph_output():
                raise ir.passes.PostconditionError(f"the constant {node.name} was not collected")
