"""Removing nodes that change nothing, and only those."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto, TensorProto
from onnx.helper import make_node

from hidiff_export.graph.passes.remove_no_ops import RemoveNoOps
from tests.export.graph.small import apply, graph

CONSTANTS = {
    "one": np.float32(1),
    "ones": np.ones((2, 3, 1), np.float32),
    "two": np.float32(2),
    "same": np.array([3, 4], np.int64),
    "other": np.array([4, 3], np.int64),
    "wide": np.array([2, 3, 4], np.int64),
}


def chain(node: NodeProto) -> dict[str, int]:
    names = [*node.input, *node.output]
    used = {name: value for name, value in CONSTANTS.items() if name in names}
    nodes = [make_node("Exp", ["x"], ["e"]), node, make_node("Neg", ["z"], ["y"])]
    return dict(apply(graph(nodes, {"x": [3, 4]}, constants=used), RemoveNoOps()))


@pytest.mark.parametrize(
    "node",
    [
        make_node("Div", ["e", "one"], ["z"]),
        make_node("Mul", ["e", "one"], ["z"]),
        make_node("Cast", ["e"], ["z"], to=TensorProto.FLOAT),
        make_node("Transpose", ["e"], ["z"], perm=[0, 1]),
        make_node("Reshape", ["e", "same"], ["z"]),
        make_node("Expand", ["e", "same"], ["z"]),
    ],
    ids=lambda node: node.op_type,
)
def test_no_ops_go(node: NodeProto) -> None:
    assert chain(node) == {"Exp": 1, "Neg": 1}


@pytest.mark.parametrize(
    "node",
    [
        make_node("Div", ["e", "two"], ["z"]),
        make_node("Mul", ["e", "ones"], ["z"]),  # it broadcasts
        make_node("Div", ["one", "e"], ["z"]),
        make_node("Cast", ["e"], ["z"], to=TensorProto.DOUBLE),
        make_node("Transpose", ["e"], ["z"], perm=[1, 0]),
        make_node("Transpose", ["e"], ["z"]),
        make_node("Reshape", ["e", "other"], ["z"]),
        make_node("Expand", ["e", "wide"], ["z"]),
    ],
    ids=lambda node: "-".join([node.op_type, *node.input]),
)
def test_others_stay(node: NodeProto) -> None:
    if node.op_type == "Cast":
        nodes = [node, make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)]
        nodes[0].input[0] = "x"
        assert apply(graph(nodes, {"x": [3, 4]}), RemoveNoOps()) == {"Cast": 2}
    else:
        assert chain(node)[node.op_type] == 1


def test_an_unknown_shape_is_a_reason() -> None:
    model = graph([make_node("Reshape", ["x", "s"], ["y"])], {"x": [3], "s": [1]}, integers=["s"])
    node = next(iter(model.graph))
    node.outputs[0].shape = None
    remove = RemoveNoOps()
    assert not remove(model).modified
    assert remove.declined == {node.name: "a shape is not known"}


def test_an_unknown_type_is_a_reason() -> None:
    nodes = [make_node("Exp", ["x"], ["e"]), make_node("Cast", ["e"], ["y"], to=TensorProto.FLOAT)]
    model = graph(nodes, {"x": [3]})
    exp, cast = model.graph
    exp.outputs[0].type = None
    remove = RemoveNoOps()
    assert not remove(model).modified
    assert remove.declined == {cast.name: "the input's type is not known"}


def test_outputs_keep_their_names() -> None:
    """Two outputs that are the same value, and one that is an input, each need a node of their own."""
    nodes = [
        make_node("Exp", ["x"], ["e"]),
        make_node("Cast", ["e"], ["y"], to=TensorProto.FLOAT),
        make_node("Mul", ["e", "one"], ["z"]),
        make_node("Div", ["x", "one"], ["w"]),
    ]
    model = graph(nodes, {"x": [3]}, ["z", "w", "y"], {"one": CONSTANTS["one"]})
    assert apply(model, RemoveNoOps()) == {"Exp": 1, "Identity": 2}
    assert [value.name for value in model.graph.outputs] == ["z", "w", "y"]
