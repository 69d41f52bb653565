"""Gathering by int32."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from onnx.helper import make_node

from hidiff_export.graph.passes.narrow_indices import NarrowIndices
from tests.export.graph.small import apply, graph


@pytest.mark.parametrize("axis", [0, 1])
def test_the_cast_goes(axis: int) -> None:
    nodes = [
        make_node("Cast", ["i"], ["w"], to=TensorProto.INT64),
        make_node("Gather", ["x", "w"], ["y"], axis=axis),
    ]
    model = graph(nodes, {"x": [3, 4], "i": [5]}, integers=["i"])
    assert apply(model, NarrowIndices()) == {"Gather": 1}


def test_a_cast_from_another_type_stays() -> None:
    nodes = [
        make_node("Cast", ["f"], ["w"], to=TensorProto.INT64),
        make_node("Gather", ["x", "w"], ["y"]),
    ]
    model = graph(nodes, {"x": [3, 4]}, constants={"f": np.array([2.0, 0.0], np.float32)})
    assert apply(model, NarrowIndices()) == {"Cast": 1, "Gather": 1}


def test_a_cast_that_others_read_stays_for_them() -> None:
    """The gathered elements and the widened indices keep their names as outputs."""
    nodes = [
        make_node("Cast", ["i"], ["w"], to=TensorProto.INT64),
        make_node("Gather", ["x", "w"], ["y"], axis=1),
        make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
    ]
    model = graph(nodes, {"x": [3, 4], "i": [5]}, ["f", "y"], integers=["i"])
    assert apply(model, NarrowIndices()) == {"Cast": 2, "Gather": 1}
    assert [value.name for value in model.graph.outputs] == ["f", "y"]
    (gather,) = (node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[1] is model.graph.inputs[1]


def test_indices_counted_from_the_end() -> None:
    nodes = [
        make_node("Sub", ["i", "three"], ["n"]),
        make_node("Cast", ["n"], ["w"], to=TensorProto.INT64),
        make_node("Gather", ["x", "w"], ["y"]),
    ]
    constants = {"three": np.array([3], np.int32)}
    model = graph(nodes, {"x": [3, 4], "i": [5]}, constants=constants, integers=["i"])
    assert apply(model, NarrowIndices()) == {"Sub": 1, "Gather": 1}
