"""What the graph passes share: rewriting a node at a time, with a reason where a pass declines."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Operator = tuple[str, str]
"""Domain and type of an operator."""


@dataclass(frozen=True)
class Replacement:
    """What takes a node's place.

    Args:
        values: used from now on wherever the node's outputs were.
        nodes: new nodes that compute them, in order; none where they are there already.
    """

    values: Sequence[ir.Value]
    nodes: Sequence[ir.Node] = ()


@dataclass(frozen=True)
class Declined:
    """Why a pass left a node alone that it could have meant."""

    reason: str


Outcome = Replacement | Declined | None
"""What comes of looking at a node; ``None`` when it is none of the pass's business."""


class RewritePass(ir.passes.InPlacePass, abc.ABC):
    """Looks at each node of some types once, in order, and replaces it or says why not.

    A subclass lists its operators and returns an `Outcome` for each of their nodes. Requires the
    nodes in topological order, which it keeps. Nodes that nothing uses any more are left for
    ``onnx_ir.passes.common.RemoveUnusedNodesPass``. Only the main graph is rewritten: a graph is refused in which a
    branch or a loop's body holds one of the operators, for that node would stay as it is and nobody would know.

    Attributes:
        declined: reason by name of the node, from the latest call.
    """

    operators: ClassVar[frozenset[Operator]]

    def __init__(self) -> None:
        super().__init__()
        self.declined: dict[str, str] = {}

    @abc.abstractmethod
    def rewrite(self, node: ir.Node) -> Outcome:
        """What is to become of ``node``."""

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
            outcome = self.rewrite(node)
            if isinstance(outcome, Declined):
                self.declined[node.name or ""] = outcome.reason
            elif outcome is not None:
                _replace(model.graph, node, outcome)
                modified = True
        return ir.passes.PassResult(model, modified)


def _replace(graph: ir.Graph, node: ir.Node, replacement: Replacement) -> None:
    for number, added in enumerate(replacement.nodes):
        # Names must differ even before they are given for good.
        added.name = f"{node.name}.{number}" if number else node.name
        # The exporter's notes say which module a node comes from; naming needs them.
        added.metadata_props.update(node.metadata_props)
    graph.insert_before(node, replacement.nodes)
    for old, new in zip(node.outputs, replacement.values, strict=True):
        if new.producer() in replacement.nodes:
            new.shape = old.shape if new.shape is None else new.shape
            new.type = old.type if new.type is None else new.type
        if old.is_graph_output():
            new = _as_output(graph, node, old, new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _as_output(graph: ir.Graph, node: ir.Node, old: ir.Value, new: ir.Value) -> ir.Value:
    """``new``, or a copy of it where an input or output of the graph cannot stand for ``old``, under its name."""
    if new.producer() is None or new.is_graph_output():
        identity = make("Identity", [new], shape=old.shape, type=old.type)
        identity.name = f"{node.name}.copy"
        graph.insert_before(node, identity)
        (new,) = identity.outputs
    new.name = old.name
    return new


def make(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    shape: Sequence[int] | ir.Shape | None = None,
    type: ir.TypeProtocol | None = None,
) -> ir.Node:
    """A node with one output of the given shape and type."""
    node = ir.node(op_type, inputs, attributes, domain=domain)
    node.outputs[0].shape = None if shape is None else ir.Shape(shape)
    node.outputs[0].type = type
    return node


def add_constant(graph: ir.Graph, array: NDArray[Any]) -> ir.Value:
    """A new initialiser with this content; its name is provisional."""
    count = len(graph.initializers)
    while (name := f"constant_{count}") in graph.initializers:
        count += 1
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape if all of it is known."""
    if value is None or value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]  # all of them are int


def constant(value: ir.Value | None, largest: int = 64) -> NDArray[Any] | None:
    """The content of a constant of at most ``largest`` elements."""
    if value is None or value.const_value is None or value.const_value.size > largest:
        return None
    return np.asarray(value.const_value.numpy())


def produced_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that computes ``value``, if it has this type."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == (domain, op_type) else None
