"""What TensorRT is given."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.engines.tensorrt.lowering import LARGEST_TENSOR, lower
from hidiff_export.errors import ExportError
from tests.export.graph.small import graph, operators


def expanded(*shape: int) -> ir.Model:
    nodes = [make_node("Expand", ["x", "shape"], ["e"], name="up/Expand"), make_node("ReduceMax", ["e"], ["y"])]
    model = graph(nodes, {"x": [1]}, constants={"shape": np.array(shape, np.int64)})
    model.graph[0].outputs[0].shape = ir.Shape(shape)
    return model


def test_a_tensor_of_two_to_the_31_elements_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="too large for TensorRT") as caught:
        lower(expanded(2**16, 2**15))
    assert caught.value.given == "Expand up/Expand gives [65536, 32768], 2,147,483,648 elements"
    assert "smaller" in (caught.value.advice or "")


def test_one_element_less_is_taken() -> None:
    lower(expanded(LARGEST_TENSOR))


def test_attention_whose_scores_are_too_many_is_cut() -> None:
    shape = [1, 8, 16384, 64]
    model = graph([make_node("Attention", ["q", "k", "k"], ["y"])], {"q": shape, "k": shape})
    lower(model)
    assert operators(model)["Softmax"] == 16
    assert operators(model)["Attention"] == 0
