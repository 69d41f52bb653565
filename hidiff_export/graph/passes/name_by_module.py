"""Names that say which module of the network a node comes from, the same in every export."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameByModule(ir.passes.InPlacePass):
    """Names nodes by module and operator, values by the node that computes them, constants by a number.

    ``down_blocks.0.resnets.1.conv1/Conv`` computes a value of that name; a second one in that module has ``_1`` after
    it. Where the exporter left no note of the module, it is taken from the name that the node has. Names of the
    graph's inputs, outputs and weights stay.

    Requires: distinct names of inputs, outputs and weights, none of which holds a slash; no subgraphs, and no constant
    that is an output of the graph, both of which the exporter's graphs are without.
    Ensures: distinct names that depend on the graph alone.

    Args:
        root: name of the module whose own name is left out before its parts'.
    """

    def __init__(self, root: str = "") -> None:
        super().__init__()
        self._root = root

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Names in place."""
        graph = model.graph
        taken: Counter[str] = Counter()
        for node in graph:
            stem = f"{_module_of(node, self._root)}/{node.op_type}"
            node.name = stem if not taken[stem] else f"{stem}_{taken[stem]}"
            taken[stem] += 1
        # In two rounds, since a new name may be another value's old one.
        computed = [value for node in graph for value in node.outputs if not value.is_graph_output()]
        for number, value in enumerate(computed):
            value.name = f"//{number}"
        for node in graph:
            for position, value in enumerate(node.outputs):
                if not value.is_graph_output():
                    value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{position}"
        self._name_constants(graph)
        return ir.passes.PassResult(model, modified=True)

    def _name_constants(self, graph: ir.Graph) -> None:
        used = dict.fromkeys(value for node in graph for value in node.inputs if value is not None)
        ordered = [value for value in used if value.is_initializer()]
        graph.initializers.clear()
        count = 0
        for value in ordered:
            if not isinstance(value.const_value, ir.ExternalTensor):
                value.name = f"constant_{count}"
                count += 1
            graph.register_initializer(value)


def _module_of(node: ir.Node, root: str) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return (node.name or "").rpartition("/")[0]
    # The last one is the operator's own name, the others are modules from the outermost inwards.
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
    path: str = modules[-1] if modules else ""
    return path.removeprefix(f"{root}.") if path != root else ""
