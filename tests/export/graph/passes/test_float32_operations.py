"""Each line of the table of float32 operations, applied to a small graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common

from hidiff_export.graph.passes.decompose_attention import DecomposeAttention
from hidiff_export.graph.passes.float32_operations import HALVES, Float32Operations, computes_in_float32

HALF = pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["float16", "bfloat16"])


def model(op_type: str, inputs: Mapping[str, list[int]], dtype: int, **attributes: Any) -> ir.Model:
    """One operator, all of whose inputs and whose output are of ``dtype``."""
    made = helper.make_graph(
        [helper.make_node(op_type, list(inputs), ["y"], "block/node", **attributes)],
        "small",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", dtype, None)],
    )
    loaded = ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    common.ShapeInferencePass()(loaded)
    return loaded


def attention(dtype: int, size: int = 64) -> ir.Model:
    return model("Attention", {name: [1, 2, 6, size] for name in "qkv"}, dtype)


def types(found: ir.Model, op_type: str) -> set[ir.DataType | None]:
    nodes = [node for node in found.graph if node.op_type == op_type]
    return {value.dtype for node in nodes for value in (*node.inputs, *node.outputs) if value is not None}


def compute(found: ir.Model, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """By ONNX's own reference, which computes in the types that stand in the graph."""
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    with np.errstate(all="ignore"):
        (y,) = ReferenceEvaluator(proto).run(None, dict(feeds))
    return np.asarray(y, np.float64)


@HALF
def test_attention_is_float32_between_casts(dtype: int) -> None:
    wrapped = attention(dtype)
    assert types(wrapped, "Attention") <= HALVES
    assert Float32Operations()(wrapped).modified
    assert types(wrapped, "Attention") == {ir.DataType.FLOAT}
    assert [node.op_type for node in wrapped.graph] == ["Cast"] * 3 + ["Attention", "Cast"]
    assert wrapped.graph.outputs[0].dtype == ir.DataType(dtype)
    onnx.checker.check_model(ir.to_proto(wrapped), full_check=True)


@HALF
def test_a_softmax_by_itself_is_one_too(dtype: int) -> None:
    wrapped = model("Softmax", {"x": [2, 5]}, dtype, axis=-1)
    Float32Operations()(wrapped)
    assert types(wrapped, "Softmax") == {ir.DataType.FLOAT}
    assert wrapped.graph[1].attributes["axis"].as_int() == -1


@HALF
def test_a_layer_normalization_is_float32_between_casts_with_its_weights(dtype: int) -> None:
    shapes = {"x": [2, 8], "w": [8], "b": [8]}
    wrapped = model("LayerNormalization", shapes, dtype, axis=-1, epsilon=1e-3)
    assert not computes_in_float32(wrapped.graph[0])
    Float32Operations()(wrapped)
    assert types(wrapped, "LayerNormalization") == {ir.DataType.FLOAT}
    assert [node.op_type for node in wrapped.graph] == ["Cast"] * 3 + ["LayerNormalization", "Cast"]
    assert wrapped.graph[3].attributes["epsilon"].as_float() == pytest.approx(1e-3)
    assert wrapped.graph.outputs[0].dtype == ir.DataType(dtype)
    onnx.checker.check_model(ir.to_proto(wrapped), full_check=True)


@pytest.mark.parametrize("op_type", ["Attention", "Softmax", "LayerNormalization"])
def test_a_float32_graph_is_left(op_type: str) -> None:
    names = {"Attention": "qkv", "Softmax": "x", "LayerNormalization": "xw"}[op_type]
    shapes = {name: [64] if name == "w" else [1, 2, 6, 64] for name in names}
    assert not Float32Operations()(model(op_type, shapes, TensorProto.FLOAT)).modified


def test_what_is_not_in_the_table_is_left() -> None:
    assert not Float32Operations()(model("MatMul", {"a": [2, 3], "b": [3, 2]}, TensorProto.FLOAT16)).modified


GROUPS = {"x": [2, 8, 4], "w": [8], "b": [8]}


@pytest.mark.parametrize("attributes", [{}, {"stash_type": 1}], ids=["default", "float32"])
def test_a_group_normalization_is_left_to_the_kernels(attributes: dict[str, Any]) -> None:
    norm = model("GroupNormalization", GROUPS, TensorProto.FLOAT16, num_groups=2, **attributes)
    assert computes_in_float32(norm.graph[0])
    assert not Float32Operations()(norm).modified


@pytest.mark.parametrize("stash_type", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["float16", "bfloat16"])
def test_a_group_normalization_that_states_16_bit_sums_is_an_error(stash_type: int) -> None:
    norm = model("GroupNormalization", GROUPS, TensorProto.FLOAT16, num_groups=2, stash_type=stash_type)
    with pytest.raises(ir.passes.PostconditionError, match="block/node is of FLOAT16, but in group normalization the"):
        Float32Operations()(norm)


@HALF
@pytest.mark.parametrize("op_type", ["Sin", "Cos"])
def test_a_time_projection_in_16_bits_is_an_error(op_type: str, dtype: int) -> None:
    with pytest.raises(ir.passes.PostconditionError, match="in time projection the network itself computes it in"):
        Float32Operations()(model(op_type, {"x": [4]}, dtype))


def test_products_of_queries_and_keys_that_overflow_float16() -> None:
    random = np.random.default_rng(0)
    feeds = {name: (random.standard_normal((1, 2, 6, 8)) * 400).astype(np.float16) for name in "qkv"}
    q, k, v = (feeds[name].astype(np.float64) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) * 8**-0.5
    assert np.abs(scores).max() > np.finfo(np.float16).max
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    due = weights / weights.sum(-1, keepdims=True) @ v
    bare, wrapped = attention(TensorProto.FLOAT16, 8), attention(TensorProto.FLOAT16, 8)
    DecomposeAttention()(bare)
    Float32Operations()(wrapped)
    DecomposeAttention()(wrapped)
    np.testing.assert_allclose(compute(wrapped, feeds), due, rtol=1e-3, atol=1e-2)
    assert not np.isfinite(compute(bare, feeds)).all()
