"""Attention as ONNX Runtime's operator, transpositions cancelled."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import NodeProto
from onnx.helper import make_node

from hidiff_export.graph.passes.attention_to_mha import AttentionToMha
from hidiff_export.graph.passes.merge_reshapes import MergeReshapes
from hidiff_export.graph.passes.merge_transposes import MergeTransposes
from tests.export.graph.small import apply, graph

BATCH, HEADS, TOKENS, CONTEXT, SIZE = 2, 3, 10, 7, 8


def split(name: str, to: str) -> list[NodeProto]:
    return [
        make_node("Reshape", [name, f"{to}_shape"], [f"{to}4"]),
        make_node("Transpose", [f"{to}4"], [to], perm=[0, 2, 1, 3]),
    ]


def attention(**attributes: Any) -> ir.Model:
    """As torch's exporter leaves it: heads are split off, moved forward, attended, moved back and joined."""
    nodes = [
        *split("x", "q"),
        *split("c", "k"),
        *split("d", "v"),
        make_node("Attention", ["q", "k", "v"], ["a"], **attributes),
        make_node("Transpose", ["a"], ["t"], perm=[0, 2, 1, 3]),
        make_node("Reshape", ["t", "joined"], ["y"]),
    ]
    shape = {"q_shape": TOKENS, "k_shape": CONTEXT, "v_shape": CONTEXT}
    constants = {name: np.array([BATCH, tokens, HEADS, SIZE], np.int64) for name, tokens in shape.items()}
    constants["joined"] = np.array([BATCH, TOKENS, HEADS * SIZE], np.int64)
    width = HEADS * SIZE
    inputs = {"x": [BATCH, TOKENS, width], "c": [BATCH, CONTEXT, width], "d": [BATCH, CONTEXT, width]}
    return graph(nodes, inputs, constants=constants)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"is_causal": 1}], ids=["default scale", "scale", "causal"])
def test_one_operator_and_nothing_around_it(attributes: dict[str, Any]) -> None:
    model = attention(**attributes)
    found = apply(model, AttentionToMha(), MergeTransposes(), MergeReshapes())
    assert found == {"MultiHeadAttention": 1}
    (node,) = model.graph
    assert node.attributes["unidirectional"].as_int() == attributes.get("is_causal", 0)


def test_heads_first_inputs_are_moved() -> None:
    nodes = [make_node("Attention", ["q", "k", "v"], ["y"])]
    shape = [BATCH, HEADS, TOKENS, SIZE]
    found = apply(graph(nodes, {"q": shape, "k": shape, "v": shape}), AttentionToMha())
    assert found == {"MultiHeadAttention": 1, "Transpose": 4, "Reshape": 4}


def test_what_the_operator_cannot_do_is_a_reason() -> None:
    model, lower = attention(softcap=2.0), AttentionToMha()
    assert apply(model, lower)["Attention"] == 1
    assert list(lower.declined.values()) == ["it is capped, grouped or has its heads in the last axis"]


def test_a_mask_is_a_reason() -> None:
    nodes = [make_node("Attention", ["q", "k", "v", "m"], ["y"])]
    shape = [BATCH, HEADS, TOKENS, SIZE]
    model = graph(nodes, {"q": shape, "k": shape, "v": shape, "m": [TOKENS, TOKENS]})
    lower = AttentionToMha()
    assert apply(model, lower) == {"Attention": 1}
    assert list(lower.declined.values()) == ["it has a mask, a cache or more than one output"]


@pytest.mark.parametrize(
    ("heads", "size"), [(1, SIZE), (HEADS, SIZE - 2)], ids=["fewer heads of keys", "another size of values"]
)
def test_heads_that_differ_are_a_reason(heads: int, size: int) -> None:
    inputs = {
        "q": [BATCH, HEADS, TOKENS, SIZE],
        "k": [BATCH, heads, CONTEXT, SIZE],
        "v": [BATCH, heads, CONTEXT, size],
    }
    lower = AttentionToMha()
    assert apply(graph([make_node("Attention", ["q", "k", "v"], ["y"])], inputs), lower) == {"Attention": 1}
    (reason,) = lower.declined.values()
    assert reason == "queries and keys have different numbers of heads, or values another size"


def test_heads_in_the_last_axis_are_a_reason() -> None:
    node = make_node("Attention", ["x", "c", "d"], ["y"], q_num_heads=HEADS, kv_num_heads=HEADS)
    width = HEADS * SIZE
    model = graph([node], {"x": [BATCH, TOKENS, width], "c": [BATCH, CONTEXT, width], "d": [BATCH, CONTEXT, width]})
    lower = AttentionToMha()
    assert apply(model, lower) == {"Attention": 1}
    assert list(lower.declined.values()) == ["it is capped, grouped or has its heads in the last axis"]


def test_an_unknown_shape_is_a_reason() -> None:
    model, lower = attention(), AttentionToMha()
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert node.inputs[1] is not None
    node.inputs[1].shape = None
    assert not lower(model).modified
    (reason,) = lower.declined.values()
    assert reason == "the shape of an input is not known, or not [batch, heads, tokens, size]"


def test_outputs_keep_their_names() -> None:
    shape = [BATCH, HEADS, TOKENS, SIZE]
    nodes = [make_node("Attention", ["q", "k", "k"], ["a"]), make_node("Attention", ["a", "k", "k"], ["b"])]
    model = graph(nodes, {"q": shape, "k": shape}, ["b", "a"])
    assert apply(model, AttentionToMha())["MultiHeadAttention"] == 2
    assert [value.name for value in model.graph.outputs] == ["b", "a"]
