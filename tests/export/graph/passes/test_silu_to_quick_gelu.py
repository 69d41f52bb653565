"""SiLU as one operator."""

from __future__ import annotations

import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.silu_to_quick_gelu import SiluToQuickGelu
from tests.export.graph.small import apply, graph


@pytest.mark.parametrize("factors", [["x", "s"], ["s", "x"]])
def test_the_product_becomes_one_operator(factors: list[str]) -> None:
    nodes = [make_node("Sigmoid", ["x"], ["s"]), make_node("Mul", factors, ["y"])]
    assert apply(graph(nodes, {"x": [3, 4]}), SiluToQuickGelu()) == {"QuickGelu": 1}


def test_a_sigmoid_of_something_else_stays() -> None:
    nodes = [make_node("Sigmoid", ["x"], ["s"]), make_node("Mul", ["s", "z"], ["y"])]
    assert apply(graph(nodes, {"x": [3], "z": [3]}), SiluToQuickGelu()) == {"Sigmoid": 1, "Mul": 1}


def test_a_product_of_two_sigmoids_stays() -> None:
    nodes = [make_node("Sigmoid", ["x"], ["s"]), make_node("Mul", ["s", "s"], ["y"])]
    assert apply(graph(nodes, {"x": [3]}), SiluToQuickGelu()) == {"Sigmoid": 1, "Mul": 1}


def test_outputs_keep_their_names() -> None:
    """A sigmoid that is an output too stays for that."""
    nodes = [make_node("Sigmoid", ["x"], ["s"]), make_node("Mul", ["x", "s"], ["y"])]
    model = graph(nodes, {"x": [3]}, ["y", "s"])
    assert apply(model, SiluToQuickGelu()) == {"Sigmoid": 1, "QuickGelu": 1}
    assert [value.name for value in model.graph.outputs] == ["y", "s"]
