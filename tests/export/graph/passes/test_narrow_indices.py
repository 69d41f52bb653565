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
