"""Transpositions in a row."""

from __future__ import annotations

import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.merge_transposes import MergeTransposes
from tests.export.graph.small import apply, graph


@pytest.mark.parametrize(
    ("orders", "left"),
    [
        ([(0, 2, 1, 3), (0, 2, 1, 3)], 0),
        ([(1, 2, 3, 0), (0, 2, 1, 3)], 1),
        ([(1, 2, 3, 0), (2, 0, 3, 1), (0, 2, 1, 3)], 1),
        ([(0, 2, 1, 3)], 1),
    ],
)
def test_one_at_most_is_left(orders: list[tuple[int, ...]], left: int) -> None:
    names = ["x", *(f"t{index}" for index in range(len(orders) - 1)), "z"]
    nodes = [make_node("Transpose", [names[i]], [names[i + 1]], perm=order) for i, order in enumerate(orders)]
    model = graph([*nodes, make_node("Exp", ["z"], ["y"])], {"x": [2, 3, 4, 5]})
    assert apply(model, MergeTransposes())["Transpose"] == left


def test_one_that_others_read_stays() -> None:
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        make_node("Transpose", ["t"], ["u"], perm=[1, 0]),
        make_node("MatMul", ["u", "t"], ["y"]),
    ]
    assert apply(graph(nodes, {"x": [2, 3]}), MergeTransposes()) == {"Transpose": 1, "MatMul": 1}


def test_without_an_order_they_stay() -> None:
    nodes = [make_node("Transpose", ["x"], ["t"]), make_node("Transpose", ["t"], ["y"], perm=[0, 1])]
    assert apply(graph(nodes, {"x": [2, 3]}), MergeTransposes()) == {"Transpose": 2}


@pytest.mark.parametrize(("second", "left"), [((1, 0, 2), "Identity"), ((0, 2, 1), "Transpose")])
def test_outputs_keep_their_names(second: tuple[int, ...], left: str) -> None:
    """Also where the input would become an output."""
    nodes = [
        make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        make_node("Transpose", ["t"], ["y"], perm=second),
    ]
    model = graph(nodes, {"x": [2, 3, 4]}, ["y", "t"])
    apply(model, MergeTransposes())
    assert [value.name for value in model.graph.outputs] == ["y", "t"]
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.op_type == left
    assert list(producer.inputs) == [model.graph.inputs[0]]
