"""Attention written out for branches: the same numbers to 16 bits, in bounded pieces, and what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from hidiff_export.graph.passes.attention_in_branches import AttentionInBranches, piece_count
from hidiff_export.graph.passes.float32_operations import Float32Operations
from tests.export.graph.small import evaluate, graph, operators, random_feeds

BATCH, HEADS, TOKENS, CONTEXT, SIZE = 2, 3, 12, 7, 16
HALF, BRAIN = TensorProto.FLOAT16, TensorProto.BFLOAT16


def attention(kind: int = HALF, **attributes: Any) -> ir.Model:
    """Float32 in and out, attention in a type of 16 bits."""
    shapes = {name: [BATCH, HEADS, CONTEXT if name in "kv" else TOKENS, SIZE] for name in "qkv"}
    casts = [helper.make_node("Cast", [name], [f"{name}16"], to=kind) for name in "qkv"]
    node = helper.make_node("Attention", ["q16", "k16", "v16"], ["y16"], **attributes)
    back = helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT)
    return graph([*casts, node, back], shapes)


def difference(found: ir.Model, due: ir.Model) -> float:
    """Largest difference of the outputs, the inputs being normal numbers."""
    feeds = random_feeds(due)
    onnx.checker.check_model(ir.to_proto(found), full_check=True)
    return float(np.abs(evaluate(found, feeds)[0] - evaluate(due, feeds)[0]).max())


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}], ids=["default scale", "scale"])
@pytest.mark.parametrize("islands", [False, True], ids=["16 bits", "cast to float32"])
def test_it_computes_what_attention_does(islands: bool, attributes: dict[str, Any]) -> None:
    model = attention(**attributes)
    if islands:
        Float32Operations()(model)
    AttentionInBranches()(model)
    assert operators(model)["Attention"] == 0
    assert difference(model, attention(**attributes)) < 2e-3
    assert difference(model, attention(scale=0.35)) > 1e-2


def test_products_are_float32_and_scores_and_probabilities_are_not() -> None:
    model = attention()
    AttentionInBranches()(model)
    for node in model.graph:
        if node.op_type == "MatMul":
            assert [value.dtype for value in node.inputs] == [ir.DataType.FLOAT] * 2
        if node.op_type == "Softmax":
            assert node.inputs[0].dtype == node.outputs[0].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_pieces_give_what_the_whole_gives(rows: int) -> None:
    whole, pieces = attention(), attention()
    AttentionInBranches()(whole)
    AttentionInBranches(rows * BATCH * HEADS * CONTEXT)(pieces)
    assert operators(pieces)["Softmax"] == TOKENS // rows
    assert difference(pieces, whole) < 1e-3


def test_bfloat16() -> None:
    model = attention(BRAIN)
    AttentionInBranches()(model)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    assert softmax.inputs[0].dtype == ir.DataType.BFLOAT16


def test_what_is_float32_from_the_start_is_left_alone() -> None:
    shapes = {name: [BATCH, HEADS, TOKENS, SIZE] for name in "qkv"}
    model = graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], shapes)
    declined = AttentionInBranches()
    declined(model)
    assert operators(model) == {"Attention": 1}
    assert list(declined.declined.values()) == ["it is not of 16 bits"]


@pytest.mark.parametrize(("attributes", "reason"), [({"is_causal": 1}, "causal"), ({"softcap": 0.5}, "capped")])
def test_what_it_does_not_know_is_left_alone(attributes: dict[str, Any], reason: str) -> None:
    model = attention(**attributes)
    declined = AttentionInBranches()
    declined(model)
    assert operators(model)["Attention"] == 1
    assert reason in next(iter(declined.declined.values()))


@pytest.mark.parametrize(
    ("tokens", "scores", "bound", "due"),
    [(16384, 8 * 8 * 16384**2, 2**31 - 1, 16), (4096, 8 * 8 * 4096**2, 2**31 - 1, 1), (6, 60, 20, 3), (7, 70, 20, 7)],
)
def test_pieces_are_equal_and_as_few_as_may_be(tokens: int, scores: int, bound: int, due: int) -> None:
    assert piece_count(tokens, scores, bound) == due
    assert tokens % due == 0
