"""Linear layers on weights as torch keeps them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.linear_to_gemm import LinearToGemm
from tests.export.graph.small import apply, graph

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((6, 4)).astype(np.float32)
BIAS = RANDOM.standard_normal(6).astype(np.float32)


def linear(shape: list[int], bias: np.ndarray | None = None, bias_first: bool = False) -> ir.Model:
    nodes = [
        make_node("Transpose", ["weight"], ["t"], perm=[1, 0]),
        make_node("MatMul", ["x", "t"], ["m" if bias is not None else "z"]),
        make_node("Exp", ["z"], ["y"]),
    ]
    constants = {"weight": WEIGHT}
    if bias is not None:
        nodes.insert(2, make_node("Add", ["b", "m"] if bias_first else ["m", "b"], ["z"]))
        constants["b"] = bias
    return graph(nodes, {"x": shape}, constants=constants)


@pytest.mark.parametrize("shape", [[3, 4], [2, 5, 4]])
@pytest.mark.parametrize("bias", [None, "last", "first"])
def test_one_product_on_the_weight_itself(shape: list[int], bias: str | None) -> None:
    model = linear(shape, None if bias is None else BIAS, bias == "first")
    assert apply(model, LinearToGemm()) == {"Reshape": 2, "Gemm": 1, "Exp": 1}
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    assert gemm.inputs[1] is model.graph.initializers["weight"]
    assert len(gemm.inputs) == (2 if bias is None else 3)


@pytest.mark.parametrize("bias", [np.float32(1).reshape(1), np.ones((5, 6), np.float32)], ids=["scalar", "matrix"])
def test_what_is_no_bias_is_still_added(bias: np.ndarray) -> None:
    assert apply(linear([2, 5, 4], bias), LinearToGemm()) == {"Reshape": 2, "Gemm": 1, "Add": 1, "Exp": 1}


def test_a_product_of_two_activations_stays() -> None:
    nodes = [make_node("Transpose", ["c"], ["t"], perm=[1, 0]), make_node("MatMul", ["x", "t"], ["y"])]
    assert apply(graph(nodes, {"x": [3, 4], "c": [5, 4]}), LinearToGemm()) == {"Transpose": 1, "MatMul": 1}


def test_a_product_that_is_used_twice_keeps_its_addition() -> None:
    model = linear([3, 4], BIAS)
    nodes = list(model.graph)
    again = ir.node("Mul", [nodes[1].outputs[0], nodes[3].outputs[0]])
    again.outputs[0].name, nodes[3].outputs[0].name = "y", "e"
    again.outputs[0].shape, again.outputs[0].type = nodes[3].outputs[0].shape, nodes[3].outputs[0].type
    model.graph.append(again)
    model.graph.outputs[0] = again.outputs[0]
    assert apply(model, LinearToGemm()) == {"Reshape": 2, "Gemm": 1, "Add": 1, "Exp": 1, "Mul": 1}


def test_two_products_that_are_added_stay_two() -> None:
    nodes = [
        make_node("Transpose", ["weight"], ["t"], perm=[1, 0]),
        make_node("MatMul", ["x", "t"], ["m"]),
        make_node("MatMul", ["z", "t"], ["n"]),
        make_node("Add", ["m", "n"], ["y"]),
    ]
    model = graph(nodes, {"x": [3, 4], "z": [3, 4]}, constants={"weight": WEIGHT})
    assert apply(model, LinearToGemm()) == {"Reshape": 4, "Gemm": 2, "Add": 1}


def test_a_weight_that_is_stored_by_input_stays() -> None:
    model = graph([make_node("MatMul", ["x", "w"], ["y"])], {"x": [3, 4]}, constants={"w": WEIGHT.T.copy()})
    assert apply(model, LinearToGemm()) == {"MatMul": 1}


def test_an_unknown_shape_stays() -> None:
    model = linear([3, 4])
    model.graph.inputs[0].shape = None
    assert not LinearToGemm()(model).modified


def test_outputs_keep_their_names() -> None:
    """The product is an output too, so the bias cannot go into it."""
    nodes = [
        make_node("Transpose", ["weight"], ["t"], perm=[1, 0]),
        make_node("MatMul", ["x", "t"], ["m"]),
        make_node("Add", ["m", "b"], ["y"]),
    ]
    model = graph(nodes, {"x": [2, 3, 4]}, ["y", "m"], {"weight": WEIGHT, "b": BIAS})
    assert apply(model, LinearToGemm()) == {"Reshape": 2, "Gemm": 1, "Add": 1}
    assert [value.name for value in model.graph.outputs] == ["y", "m"]


def test_a_transpose_that_moves_nothing_is_not_a_transposed_weight() -> None:
    square = RANDOM.standard_normal((4, 4)).astype(np.float32)
    nodes = [make_node("Transpose", ["w"], ["t"], perm=[0, 1]), make_node("MatMul", ["x", "t"], ["y"])]
    assert apply(graph(nodes, {"x": [3, 4]}, constants={"w": square}), LinearToGemm())["MatMul"] == 1


def test_a_transpose_without_an_order_swaps_both_axes() -> None:
    nodes = [make_node("Transpose", ["w"], ["t"]), make_node("MatMul", ["x", "t"], ["y"])]
    assert apply(graph(nodes, {"x": [3, 4]}, constants={"w": WEIGHT}), LinearToGemm())["Gemm"] == 1


def test_an_addend_that_is_computed_is_no_bias() -> None:
    nodes = [
        make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        make_node("MatMul", ["x", "t"], ["m"]),
        make_node("Exp", ["c"], ["e"]),
        make_node("Add", ["m", "e"], ["y"]),
    ]
    model = graph(nodes, {"x": [3, 4], "c": [6]}, constants={"w": WEIGHT})
    assert apply(model, LinearToGemm()) == {"Reshape": 2, "Gemm": 1, "Exp": 1, "Add": 1}
