"""One place for constants: initializers, each content once."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes import common

_SMALL = 1024


class CollectConstants(ir.passes.InPlacePass):
    """Turns ``Constant`` nodes into initializers and keeps one of equal small ones.

    Requires: nothing.
    Ensures: no ``Constant`` node is left but one that is an output of the graph.

    Args:
        weights: names of initializers that stay as they are, whatever they are equal to: biases that are all zero in
            one checkpoint are not in another, and a graph is for both.
    """

    def __init__(self, weights: Collection[str] = ()) -> None:
        super().__init__()
        self._weights = frozenset(weights)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Collects in place."""
        lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
        modified = lift(model).modified
        first: dict[tuple[ir.DataType, tuple[object, ...], bytes], ir.Value] = {}
        for name, value in tuple(model.graph.initializers.items()):
            tensor = value.const_value
            if name in self._weights or tensor is None or tensor.size > _SMALL or value.is_graph_output():
                continue
            same = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
            if same is not value:
                value.replace_all_uses_with(same)
                model.graph.initializers.pop(name)
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Checks that no node inside the graph is a constant."""
        for node in model.graph:
            if node.op_type == "Constant" and not node.outputs[0].is_graph_output():
                raise ir.passes.PostconditionError(f"the constant {node.name} was not collected")
