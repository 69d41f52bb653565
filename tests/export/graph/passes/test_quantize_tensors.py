"""Q/DQ nodes where calibration says: what they compute, in ONNX Runtime, and when the pass refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from hidiff_export.graph.passes.quantize_tensors import QuantizeTensors
from hidiff_export.graph.quantized_tensor import QuantizedTensor

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4)).astype(np.float16)
W = RNG.standard_normal((2, 4)).astype(np.float16)
SCALES = np.abs(W).max(axis=1) / 127


def _model() -> ir.Model:
    """Two layers of the same weight and input: only one is to be quantized."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(X.shape))
    w = ir.Value(name="w", type=x.type, shape=ir.Shape(W.shape), const_value=ir.tensor(W, name="w"))
    nodes = [ir.node("Gemm", [x, w], {"transB": 1}, name=f"{name}/Gemm") for name in ("few", "all")]
    for node in nodes:
        node.outputs[0].name = node.name
        node.outputs[0].type = x.type
        node.outputs[0].shape = ir.Shape((3, 2))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[w], opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def _run(model: ir.Model) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    few, whole = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})
    return few, whole


def _tensors(use: tuple[str, int] = ("few/Gemm", 1)) -> list[QuantizedTensor]:
    return [
        QuantizedTensor("x", (0.03125,), None, (("few/Gemm", 0),)),
        QuantizedTensor("w", tuple(SCALES.astype(float).tolist()), 0, (use,)),
    ]


def test_int8_is_rounded_to_the_scale_of_the_tensor_or_the_channel() -> None:
    model = _model()
    QuantizeTensors(_tensors(), ir.DataType.INT8)(model)
    few, whole = _run(model)
    rows = SCALES[:, None].astype(np.float32)
    x = np.clip(np.rint(X.astype(np.float32) / 0.03125), -128, 127) * 0.03125
    w = np.clip(np.rint(W / rows), -128, 127) * rows
    np.testing.assert_allclose(few, x @ w.T, atol=4e-3)
    np.testing.assert_allclose(whole, X.astype(np.float32) @ W.astype(np.float32).T, atol=4e-3)
    assert np.abs(few - whole).max() > 4e-3


def test_fp8_has_four_significant_bits() -> None:
    model = _model()
    QuantizeTensors(_tensors()[:1], ir.DataType.FLOAT8E4M3FN)(model)
    few, whole = _run(model)
    error = np.abs(few.astype(np.float32) - whole)
    assert 0 < error.max() < np.abs(X).max() * np.abs(W).sum(axis=1).max() / 16
    kinds = [value.type for node in model.graph if node.op_type == "QuantizeLinear" for value in node.outputs]
    assert kinds == [ir.TensorType(ir.DataType.FLOAT8E4M3FN)]


@pytest.mark.parametrize(("stated", "quotient"), [(True, 81), (False, 80)], ids=["as it is", "without"])
def test_quotients_are_rounded_once_because_the_node_says_so(stated: bool, quotient: int) -> None:
    scale = np.float16(0.04208)
    x = np.full(X.shape, 3.389, np.float16)  # 80.522 times the scale, in float16 80.5
    model = _model()
    tensor = QuantizedTensor("x", (float(scale),), None, (("few/Gemm", 0),))
    QuantizeTensors([tensor], ir.DataType.INT8)(model)
    (node,) = (node for node in model.graph if node.op_type == "QuantizeLinear")
    assert node.attributes["precision"].as_int() == ir.DataType.FLOAT
    if not stated:
        del node.attributes["precision"]
    model.graph.outputs.append(node.outputs[0])
    node.outputs[0].name = "quotient"
    content = ir.to_proto(model).SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    assert np.all(session.run(["quotient"], {"x": x})[0] == quotient)


def test_the_weight_stays_one_initializer() -> None:
    model = _model()
    QuantizeTensors(_tensors(), ir.DataType.INT8)(model)
    large = [value.name for value in model.graph.initializers.values() if value.const_value.size > 2]
    assert large == ["w"]


@pytest.mark.parametrize("use", [("few/Gemm", 0), ("none/Gemm", 1)])
def test_a_place_that_does_not_read_the_tensor_is_refused(use: tuple[str, int]) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=rf"Input {use[1]} of {use[0]} is not w\."):
        QuantizeTensors(_tensors(use), ir.DataType.INT8)(_model())
