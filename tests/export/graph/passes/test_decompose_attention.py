"""Attention without a fused kernel as products and a softmax, a piece of the queries at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.helper import make_node

from hidiff_export.graph.passes.decompose_attention import HEAD_SIZES, DecomposeAttention, piece_sizes
from tests.export.graph.small import apply, graph, operators

BATCH, HEADS, TOKENS, CONTEXT, SIZE = 2, 3, 10, 7, 8


def attention(size: int = SIZE, values: int | None = None, **attributes: Any) -> ir.Model:
    shapes = {
        "q": [BATCH, HEADS, TOKENS, size],
        "k": [BATCH, HEADS, CONTEXT, size],
        "v": [BATCH, HEADS, CONTEXT, values or size],
    }
    return graph([make_node("Attention", ["q", "k", "v"], ["y"], **attributes)], shapes)


def narrow(size: int, dtype: str, to: ir.DataType | None = None) -> ir.Model:
    """Attention on tensors that are cast to ``dtype`` and perhaps from there on to another type."""
    model = attention(size)
    (node,) = model.graph
    for position, value in enumerate(tuple(node.inputs)):
        for kind in (ir.DataType[dtype], to):
            if kind is not None:
                cast = ir.node("Cast", [value], {"to": kind})
                cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(kind)
                model.graph.insert_before(node, cast)
                (value,) = cast.outputs
        node.replace_input_with(position, value)
    inner = node.outputs[0]
    inner.type = ir.TensorType(to or ir.DataType[dtype])
    back = ir.node("Cast", [inner], {"to": ir.DataType.FLOAT}, name="back")
    back.outputs[0].name, inner.name = "y", "inner"
    back.outputs[0].type, back.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), inner.shape
    model.graph.append(back)
    model.graph.outputs[0] = back.outputs[0]
    return model


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}], ids=["default scale", "scale"])
def test_whole(attributes: dict[str, Any]) -> None:
    assert apply(attention(**attributes), DecomposeAttention()) == {"Mul": 1, "Transpose": 1, "MatMul": 2, "Softmax": 1}


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_pieces_give_what_the_whole_gives(rows: int) -> None:
    model = attention()
    bound = rows * BATCH * HEADS * CONTEXT
    found = apply(model, DecomposeAttention(bound))
    assert found["Softmax"] == -(-TOKENS // rows) > 1
    sizes = [value.shape.numpy() for node in model.graph if node.op_type == "Softmax" for value in node.outputs]
    assert all(np.prod(size) <= bound for size in sizes)
    assert sum(size[2] for size in sizes) == TOKENS


@pytest.mark.parametrize("rows", [3, TOKENS])
def test_causal_attention_masks_later_tokens(rows: int) -> None:
    found = apply(attention(is_causal=1), DecomposeAttention(rows * BATCH * HEADS * CONTEXT))
    assert found["Add"] == found["Softmax"] == -(-TOKENS // rows)


def test_another_size_of_values() -> None:
    assert apply(attention(16, values=24), DecomposeAttention())["Attention"] == 0


def test_pieces_are_even_and_never_empty() -> None:
    assert piece_sizes(10, 5, 20) == [4, 3, 3]
    assert piece_sizes(10, 5, 50) == [10]
    assert piece_sizes(3, 100, 7) == [1, 1, 1]  # one row is taken even where it is too large


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("to", [None, ir.DataType.FLOAT], ids=["narrow", "cast to float32"])
@pytest.mark.parametrize(
    ("size", "kept"), [(8, False), (12, False), (16, True), (40, True), (256, True), (264, False), (512, False)]
)
def test_where_there_is_a_kernel_it_is_left(dtype: str, to: ir.DataType | None, size: int, kept: bool) -> None:
    model = narrow(size, dtype, to)
    DecomposeAttention()(model)
    assert (operators(model)["Attention"] == 1) is kept
    softmaxes = [node.outputs[0].dtype for node in model.graph if node.op_type == "Softmax"]
    assert softmaxes == ([] if kept else [to or ir.DataType[dtype]])


@pytest.mark.parametrize("size", [16, 64])
def test_float32_has_no_kernel(size: int) -> None:
    assert size in HEAD_SIZES
    assert apply(attention(size), DecomposeAttention())["Attention"] == 0


def test_what_is_more_than_attention_is_a_reason() -> None:
    model, lower = attention(softcap=2.0), DecomposeAttention()
    assert apply(model, lower) == {"Attention": 1}
    assert list(lower.declined.values()) == ["it is capped, grouped or has its heads in the last axis"]


def test_a_mask_is_a_reason() -> None:
    shape, lower = [BATCH, HEADS, TOKENS, SIZE], DecomposeAttention()
    node = make_node("Attention", ["q", "k", "v", "m"], ["y"])
    model = graph([node], {"q": shape, "k": shape, "v": shape, "m": [TOKENS, TOKENS]})
    assert apply(model, lower) == {"Attention": 1}
    assert list(lower.declined.values()) == ["it has a mask, a cache or more than one output"]


def test_fewer_heads_of_keys_are_a_reason() -> None:
    inputs = {"q": [2, 4, 5, 8], "k": [2, 2, 5, 8], "v": [2, 2, 5, 8]}
    lower = DecomposeAttention()
    assert apply(graph([make_node("Attention", ["q", "k", "v"], ["y"])], inputs), lower) == {"Attention": 1}
    assert list(lower.declined.values()) == ["queries and keys have different numbers of heads"]


def test_an_unknown_shape_is_a_reason() -> None:
    model, lower = attention(), DecomposeAttention()
    model.graph.inputs[1].shape = None
    assert not lower(model).modified
    (reason,) = lower.declined.values()
    assert reason == "the shape of an input is not known, or not [batch, heads, tokens, size]"
