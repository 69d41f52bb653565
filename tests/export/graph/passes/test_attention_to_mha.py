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


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}], ids=["default scale", "scale"])
def test_one_operator_and_nothing_around_it(attributes: dict[str, Any]) -> None:
    model = attention(**attributes)
    found = apply(model, AttentionToMha(), MergeTransposes(), MergeReshapes())
    assert found == {"MultiHeadAttention": 1}


def test_heads_first_inputs_are_moved() -> None:
    nodes = [make_node("Attention", ["q", "k", "v"], ["y"])]
    shape = [BATCH, HEADS, TOKENS, SIZE]
    found = apply(graph(nodes, {"q": shape, "k": shape, "v": shape}), AttentionToMha())
    assert found == {"MultiHeadAttention": 1, "Transpose": 4, "Reshape": 4}


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"softcap": 2.0}], ids=["causal", "capped"])
def test_what_the_operator_cannot_do_is_a_reason(attributes: dict[str, Any]) -> None:
    model, lower = attention(**attributes), AttentionToMha()
    assert apply(model, lower)["Attention"] == 1
    assert list(lower.declined.values()) == ["it is causal, capped, grouped or has its heads in the last axis"]


def test_a_mask_is_a_reason() -> None:
    nodes = [make_node("Attention", ["q", "k", "v", "m"], ["y"])]
    shape = [BATCH, HEADS, TOKENS, SIZE]
    model = graph(nodes, {"q": shape, "k": shape, "v": shape, "m": [TOKENS, TOKENS]})
    lower = AttentionToMha()
    assert apply(model, lower) == {"Attention": 1}
    assert list(lower.declined.values()) == ["it has a mask, a cache or more than one output"]
