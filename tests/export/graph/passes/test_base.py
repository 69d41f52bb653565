"""Rewriting node by node: order, outputs, reasons, names."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.base import (
    Declined,
    Operator,
    Outcome,
    RewritePass,
    constant,
    static_shape,
)
from tests.export.graph.small import apply, evaluate, graph, operators, random_feeds


class DropNeg(RewritePass):
    """Takes -x for x, which is wrong, so that a test can see it happen; keeps what is called ``keep``."""

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "Neg")})

    def rewrite(self, node: ir.Node) -> Outcome:
        if node.name == "keep":
            return Declined("it was asked to stay")
        (value,) = node.inputs
        assert value is not None
        return [value]


class DoubleNeg(RewritePass):
    """Computes -x as 0 - x."""

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "Neg")})

    def rewrite(self, node: ir.Node) -> Outcome:
        return [self.build.op("Sub", self.build.constant([0], np.float32), node.inputs[0])]


def test_new_nodes_take_the_old_ones_place_name_shape_and_notes() -> None:
    model = graph([make_node("Neg", ["x"], ["n"], name="a/Neg"), make_node("Exp", ["n"], ["y"])], {"x": [3, 2]})
    next(iter(model.graph)).metadata_props["note"] = "kept"
    assert apply(model, DoubleNeg()) == {"Sub": 1, "Exp": 1}
    less = next(iter(model.graph))
    assert less.name == "a/Neg"
    assert less.metadata_props["note"] == "kept"
    assert static_shape(less.outputs[0]) == (3, 2)
    assert less.outputs[0].dtype == ir.DataType.FLOAT


def test_a_pass_that_changes_results_is_noticed() -> None:
    model = graph([make_node("Neg", ["x"], ["n"]), make_node("Exp", ["n"], ["y"])], {"x": [3]})
    with pytest.raises(AssertionError):
        apply(model, DropNeg())


def test_declined_says_why_and_by_which_name() -> None:
    model = graph([make_node("Neg", ["x"], ["n"], name="keep"), make_node("Neg", ["n"], ["y"])], {"x": [3]})
    drop = DropNeg()
    result = drop(model)
    assert result.modified
    assert drop.declined == {"keep": "it was asked to stay"}
    assert operators(model)["Neg"] == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_outputs_keep_their_names(nodes: int) -> None:
    chain = [make_node("Exp", ["x"], ["e"]), make_node("Neg", ["e"], ["y"])][2 - nodes :]
    if nodes == 1:
        chain[0].input[0] = "x"
    model = graph(chain, {"x": [3]})
    feeds = random_feeds(model)
    DropNeg()(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    (found,) = evaluate(model, feeds)
    np.testing.assert_array_equal(found, feeds["x"] if nodes == 1 else np.exp(feeds["x"]).astype(np.float32))


def test_constants_are_read_up_to_a_size() -> None:
    model = graph([make_node("Exp", ["x"], ["y"])], {"x": [1]})
    two = NodeBuilder(model.graph).constant([2])
    assert constant(two) == [2]
    assert constant(two, largest=0) is None
    assert constant(model.graph.inputs[0]) is None
