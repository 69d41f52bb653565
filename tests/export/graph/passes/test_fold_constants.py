"""Folding: constants go, weights stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.fold_constants import LARGEST_RESULT, FoldConstants
from tests.export.graph.small import apply, graph

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def linear() -> ir.Model:
    nodes = [make_node("Transpose", ["weight"], ["t"], perm=[1, 0]), make_node("MatMul", ["x", "t"], ["y"])]
    return graph(nodes, {"x": [4, 3]}, constants={"weight": WEIGHT})


def test_a_transposed_weight_is_not_folded() -> None:
    model = linear()
    assert apply(model, FoldConstants({"weight"})) == {"Transpose": 1, "MatMul": 1}
    weight = model.graph.initializers["weight"].const_value
    assert weight is not None
    assert weight.numpy().tobytes() == WEIGHT.tobytes()


def test_what_is_no_weight_is_folded() -> None:
    assert apply(linear(), FoldConstants(())) == {"MatMul": 1}


def test_sequences_become_a_split() -> None:
    nodes = [
        make_node("SplitToSequence", ["x", "sizes"], ["s"], axis=1),
        make_node("SequenceAt", ["s", "one"], ["last"]),
        make_node("SequenceAt", ["s", "none"], ["first"]),
        make_node("Sub", ["first", "last"], ["y"]),
    ]
    constants = {"sizes": np.array([2, 2], np.int64), "one": np.array(1, np.int64), "none": np.array(0, np.int64)}
    model = graph(nodes, {"x": [3, 4]}, constants=constants)
    assert apply(model, FoldConstants(())) == {"Split": 1, "Sub": 1}


def test_a_sequence_that_is_left_is_an_error() -> None:
    nodes = [
        make_node("SequenceConstruct", ["x", "x"], ["s"]),
        make_node("ConcatFromSequence", ["s"], ["c"], axis=0, new_axis=1),
        make_node("SequenceLength", ["s"], ["n"]),
        make_node("Cast", ["n"], ["f"], to=1),
        make_node("SequenceInsert", ["s", "x"], ["t"]),
        make_node("SequenceAt", ["t", "index"], ["a"]),
        make_node("Add", ["a", "f"], ["y"]),
    ]
    model = graph(nodes, {"x": [2], "index": [1]}, integers=["index"])
    with pytest.raises(ir.passes.PostconditionError, match="works on a sequence"):
        FoldConstants(())(model)


def test_a_large_result_is_not_made() -> None:
    nodes = [make_node("Expand", ["one", "size"], ["ones"]), make_node("Add", ["x", "ones"], ["y"])]
    for size, left in ((LARGEST_RESULT, {"Add": 1}), (LARGEST_RESULT + 1, {"Expand": 1, "Add": 1})):
        constants = {"one": np.ones(1, np.float32), "size": np.array([size], np.int64)}
        assert apply(graph(nodes, {"x": [size]}, constants=constants), FoldConstants(())) == left


def test_outputs_keep_their_names() -> None:
    nodes = [
        make_node("Add", ["a", "a"], ["b"]),
        make_node("Mul", ["x", "b"], ["z"]),
        make_node("Neg", ["a"], ["c"]),
    ]
    model = graph(nodes, {"x": [3]}, ["c", "z"], {"a": np.array([1.0, 2.0, 3.0], np.float32)})
    assert apply(model, FoldConstants(())) == {"Mul": 1}
    assert [value.name for value in model.graph.outputs] == ["c", "z"]
