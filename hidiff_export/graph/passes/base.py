"""What the graph passes share: rewriting a node at a time, with a reason where a pass declines."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hidiff_export.graph.node_builder import NodeBuilder

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Operator = tuple[str, str]
"""Domain and type of an operator."""


@dataclass(frozen=True)
class Declined:
    """Why a pass left a node alone that it could have meant."""

    reason: str


Outcome = Sequence[ir.Value] | Declined | None
"""What comes of looking at a node: the values to use from now on in place of its outputs, made by the pass's builder or
there already, or why it stays; ``None`` when it is none of the pass's business."""


class RewritePass(ir.passes.InPlacePass, abc.ABC):
    """Looks at each node of some types once, in order, and replaces it or says why not.

    A subclass lists its operators, makes nodes with `build` and returns an `Outcome` for each node. Requires the
    nodes in topological order, which it keeps. Nodes that nothing uses any more are left for
    ``onnx_ir.passes.common.RemoveUnusedNodesPass``. Only the main graph is rewritten: a graph is refused in which a
    branch or a loop's body holds one of the operators, for that node would stay as it is and nobody would know.

    Attributes:
        build: takes the nodes that are to stand before the one that is looked at.
        declined: reason by name of the node, from the latest call.
    """

    operators: ClassVar[frozenset[Operator]]
    build: NodeBuilder

    def __init__(self) -> None:
        super().__init__()
        self.declined: dict[str, str] = {}

    @abc.abstractmethod
    def rewrite(self, node: ir.Node) -> Outcome:
        """Decides what is to become of ``node``."""

    def requires(self, model: ir.Model) -> None:
        """Checks that no subgraph holds one of the operators."""
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.graph is not model.graph and (node.domain, node.op_type) in self.operators:
                found = f"{node.op_type} {node.name} is in a subgraph"
                raise ir.passes.PreconditionError(f"{type(self).__name__} rewrites the main graph alone, and {found}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Runs over the main graph."""
        self.declined = {}
        modified = False
        for node in tuple(model.graph):
            if (node.domain, node.op_type) not in self.operators:
                continue
            self.build = NodeBuilder(model.graph)
            outcome = self.rewrite(node)
            if isinstance(outcome, Declined):
                self.declined[node.name or ""] = outcome.reason
            elif outcome is not None:
                _replace(model.graph, node, self.build.nodes, outcome)
                modified = True
        return ir.passes.PassResult(model, modified)


def _replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], values: Sequence[ir.Value]) -> None:
    for number, added in enumerate(nodes):
        # Names must differ even before they are given for good.
        added.name = f"{node.name}.{number}" if number else node.name
        # The exporter's notes say which module a node comes from; naming needs them.
        added.metadata_props.update(node.metadata_props)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, values, strict=True):
        if new.producer() in nodes:
            new.shape = old.shape if static_shape(new) is None else new.shape
            new.type = old.type if new.type is None else new.type
        if old.is_graph_output():
            new = _as_output(graph, node, old, new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _as_output(graph: ir.Graph, node: ir.Node, old: ir.Value, new: ir.Value) -> ir.Value:
    """Gives ``old``'s name to ``new``, or to a copy where an input or output of the graph cannot stand for it."""
    if new.producer() is None or new.is_graph_output():
        build = NodeBuilder(graph)
        new = build.op("Identity", new)
        build.nodes[0].name = f"{node.name}.copy"
        graph.insert_before(node, build.nodes)
    new.name = old.name
    return new


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Gives the shape if all of it is known."""
    shape = None if value is None else value.shape
    return shape.numpy() if shape is not None and shape.is_static() else None


def constant(value: ir.Value | None, largest: int = 64) -> NDArray[Any] | None:
    """Reads a constant of at most ``largest`` elements."""
    if value is None or value.const_value is None or value.const_value.size > largest:
        return None
    return np.asarray(value.const_value.numpy())


def produced_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Finds the node that computes ``value``, if it has this type of ONNX's own domain."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None
