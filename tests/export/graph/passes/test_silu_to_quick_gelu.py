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
