"""Constants as initializers, once each."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper
from onnx.helper import make_node

from hidiff_export.graph.passes.collect_constants import CollectConstants
from tests.export.graph.small import apply, graph


def test_equal_constants_become_one_initializer() -> None:
    nodes = [
        make_node("Constant", [], ["a"], value=numpy_helper.from_array(np.array([2.0], np.float32))),
        make_node("Constant", [], ["b"], value_floats=[2.0]),
        make_node("Constant", [], ["c"], value_floats=[3.0]),
        make_node("Sum", ["x", "a", "b", "c"], ["y"]),
    ]
    model = graph(nodes, {"x": [3]})
    assert apply(model, CollectConstants()) == {"Sum": 1}
    assert sorted(float(value.const_value.numpy()[0]) for value in model.graph.initializers.values()) == [2.0, 3.0]


def test_large_equal_ones_are_not_compared() -> None:
    ones = np.ones(2048, np.float32)
    nodes = [make_node("Sum", ["x", "a", "b"], ["y"])]
    model = graph(nodes, {"x": [2048]}, constants={"a": ones, "b": ones})
    assert apply(model, CollectConstants()) == {"Sum": 1}
    assert list(model.graph.initializers) == ["a", "b"]


def test_equal_numbers_of_other_types_or_shapes_stay_apart() -> None:
    nodes = [
        make_node("Constant", [], ["a"], value_floats=[1.0]),
        make_node("Constant", [], ["b"], value_float=1.0),
        make_node("Constant", [], ["c"], value_ints=[1]),
        make_node("Sum", ["x", "a", "b"], ["s"]),
        make_node("Reshape", ["s", "c"], ["y"]),
    ]
    model = graph(nodes, {"x": [1]})
    assert apply(model, CollectConstants()) == {"Sum": 1, "Reshape": 1}
    assert len(model.graph.initializers) == 3


def test_without_constants_nothing_changes() -> None:
    model = graph([make_node("Exp", ["x"], ["y"])], {"x": [2]})
    assert not CollectConstants()(model).modified
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_constant_that_is_an_output_stays() -> None:
    nodes = [make_node("Constant", [], ["y"], value_floats=[1.0]), make_node("Exp", ["x"], ["z"])]
    assert apply(graph(nodes, {"x": [2]}, ["y", "z"]), CollectConstants()) == {"Constant": 1, "Exp": 1}


def test_weights_stay_apart_whatever_they_hold() -> None:
    one = np.ones(4, np.float32)
    nodes = [make_node("Sum", ["x", "first.bias", "second.bias", "c", "d"], ["y"])]
    model = graph(nodes, {"x": [4]}, constants={"first.bias": one, "second.bias": one, "c": one, "d": one})
    assert apply(model, CollectConstants({"first.bias", "second.bias"})) == {"Sum": 1}
    assert list(model.graph.initializers) == ["first.bias", "second.bias", "c"]
