"""Constants as initialisers, once each."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper
from onnx.helper import make_node

from hidiff_export.graph.passes.collect_constants import CollectConstants
from tests.export.graph.small import apply, graph


def test_equal_constants_become_one_initialiser() -> None:
    nodes = [
        make_node("Constant", [], ["a"], value=numpy_helper.from_array(np.array([2.0], np.float32))),
        make_node("Constant", [], ["b"], value_floats=[2.0]),
        make_node("Constant", [], ["c"], value_floats=[3.0]),
        make_node("Sum", ["x", "a", "b", "c"], ["y"]),
    ]
    model = graph(nodes, {"x": [3]})
    assert apply(model, CollectConstants()) == {"Sum": 1}
    assert sorted(float(value.const_value.numpy()[0]) for value in model.graph.initializers.values()) == [2.0, 3.0]
