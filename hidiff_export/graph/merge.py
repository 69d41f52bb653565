"""All phases in one graph: each is a branch, and bool inputs say which one runs, so that weights are there once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from hidiff_export.errors import ExportError
from hidiff_export.graph.passes.base import static_shape

SELECTOR = "select_"
"""Begins the name of a selector; the phase's name follows."""


def selector_name(phase: str) -> str:
    """The bool input that chooses a phase. The first phase has none: it runs where no other is chosen."""
    return f"{SELECTOR}{phase}"


def merge(models: Mapping[str, ir.Model]) -> ir.Model:
    """One model that computes what one of several does, as its selectors say.

    Beside the inputs of all phases it has a bool 0-D input :func:`selector_name` for each phase but the first. The last
    phase whose selector is true runs, the first phase where none is. Branches are nested, so that nothing of the other
    phases runs. The models given are taken apart and are of no use afterwards.

    Args:
        models: by name of the phase. Inputs and outputs of one name have one shape and type, weights of one name lie
            at one place in one store.

    Raises:
        ExportError: inputs, outputs or weights of one name differ.
    """
    outer = _Outer()
    branches = [outer.branch(phase, model.graph) for phase, model in models.items()]
    selectors = [
        ir.Value(name=selector_name(phase), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
        for phase in list(models)[1:]
    ]
    nodes: list[ir.Node] = []
    chosen = branches[0]
    for selector, branch in zip(selectors, branches[1:], strict=True):
        if nodes:
            chosen = ir.Graph([], list(nodes[-1].outputs), nodes=[nodes[-1]], name=f"unless_{selector.name}")
        nodes.append(_either(selector, branch, chosen))
    first = next(iter(models.values()))
    graph = ir.Graph(
        [*outer.inputs.values(), *selectors],
        list(nodes[-1].outputs),
        nodes=[nodes[-1]],
        initializers=list(outer.initializers.values()),
        opset_imports=dict(first.graph.opset_imports),
        name="merged",
    )
    for value, (name, _) in zip(graph.outputs, outer.outputs, strict=True):
        value.name = name
    return ir.Model(graph, ir_version=first.ir_version)


class _Outer:
    """What the branches have in common: inputs, and weights and constants of equal content."""

    def __init__(self) -> None:
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[tuple[str, _Signature]] = []
        self.initializers: dict[Any, ir.Value] = {}

    def branch(self, phase: str, graph: ir.Graph) -> ir.Graph:
        """Makes a phase's graph a branch: no inputs and constants of its own, and names that no other branch has."""
        outputs = [(_name(value), _signature(value)) for value in graph.outputs]
        if self.outputs and outputs != self.outputs:
            raise _differs(f"outputs of phase {phase}", outputs, self.outputs)
        self.outputs = outputs
        for value in list(graph.inputs):
            ours = self.inputs.setdefault(_name(value), ir.Value(name=value.name, type=value.type, shape=value.shape))
            if _signature(ours) != _signature(value):
                raise _differs(f"input {value.name}", _signature(value), _signature(ours))
            value.replace_all_uses_with(ours)
        graph.inputs.clear()
        for name in list(graph.initializers):
            self._take(phase, graph.initializers.pop(name))
        for node in graph:
            node.name = f"{phase}/{node.name}"
            for value in node.outputs:
                value.name = f"{phase}/{value.name}"
        graph.name = phase
        return graph

    def _take(self, phase: str, value: ir.Value) -> None:
        """Moves a weight or constant out of a branch, or has the branch use an equal one that is there already."""
        tensor = value.const_value
        assert tensor is not None  # an initialiser has a content
        if isinstance(tensor, ir.ExternalTensor):
            ours = self.initializers.setdefault(value.name, value)
            place, due = _place(tensor), _place(ours.const_value)
            if place != due:
                raise _differs(f"weight {value.name}", place, due)
        else:
            key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
            ours = self.initializers.setdefault(key, value)
            if ours is value:
                value.name = f"{phase}/{value.name}"
        if ours is not value:
            value.replace_all_uses_with(ours)


def _either(selector: ir.Value, branch: ir.Graph, other: ir.Graph) -> ir.Node:
    node = ir.node(
        "If",
        [selector],
        {"then_branch": branch, "else_branch": other},
        num_outputs=len(branch.outputs),
        name=f"if_{selector.name}",
    )
    for value, inner in zip(node.outputs, branch.outputs, strict=True):
        value.name, value.shape, value.type = f"{node.name}/{inner.name}", inner.shape, inner.type
    return node


_Signature = tuple[tuple[int, ...] | None, ir.DataType | None]


def _signature(value: ir.Value) -> _Signature:
    return static_shape(value), value.dtype


def _name(value: ir.Value) -> str:
    assert value.name is not None  # inputs and outputs have names
    return value.name


def _place(tensor: Any) -> Sequence[Any]:
    return tensor.location, tensor.offset, tensor.length, tensor.dtype, tuple(tensor.shape)


def _differs(what: str, found: object, due: object) -> ExportError:
    return ExportError(
        f"Phases cannot be merged: the {what} of one is not another's.",
        given=f"{found}, and {due}",
        advice="Use layout: per-phase, or build again from one checkpoint.",
    )
