"""The store of integers holds what ONNX Runtime's QuantizeLinear makes of each weight, and graphs read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hidiff_export.graph.derived_store import DerivedStore
from hidiff_export.graph.portable import load_graph, save
from hidiff_export.quantization.integer_store import integer_tensors, quantized_weights, read_integers, store_name
from hidiff_runtime.format.safetensors import SafetensorsFile

RANDOM = np.random.default_rng(0)
WEIGHT = np.round(RANDOM.standard_normal((4, 6)) * 64).astype(np.float16) / 64  # many ties between two integers
SCALE = np.float16([0.03125, 0.0625, 0.011, 0.015625])  # the last too small for the largest weights


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A product with a quantized weight, which is an output of its own too."""
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["few"], name="Q", axis=0, precision=1),
        helper.make_node("DequantizeLinear", ["few", "scale", "zero"], ["back"], name="DQ", axis=0),
        helper.make_node("MatMul", ["x", "back"], ["y"], name="MatMul"),
        helper.make_node("Identity", ["few"], ["integers"], name="Identity"),
    ]
    constants = {"w": WEIGHT, "scale": SCALE, "zero": np.zeros(4, np.int8)}
    made = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 6]),
            helper.make_tensor_value_info("integers", TensorProto.INT8, [4, 6]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=[helper.make_tensor_value_info("few", TensorProto.INT8, [4, 6])],
    )
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "phase.onnx"
    )
    return tmp_path / "phase.onnx"


def run(path: Path) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": np.float16(np.arange(8).reshape(2, 4) / 8)})
    return found


def test_integers_are_those_of_the_operator(graph: Path) -> None:
    model = load_graph(graph)
    nodes = quantized_weights(model.graph)
    store = DerivedStore(graph.with_name(store_name(nodes)), integer_tensors(nodes))
    store.write(lambda _: None)
    product, integers = run(graph)
    assert (np.abs(integers) == 127).any() or (integers == -128).any()  # some are cut off
    np.testing.assert_array_equal(SafetensorsFile.open(store.path).array("w"), integers)
    read_integers(model, store)
    assert not quantized_weights(model.graph)
    save(model, graph.with_name("lowered.onnx"))
    found = run(graph.with_name("lowered.onnx"))
    np.testing.assert_array_equal(found[0], product)
    np.testing.assert_array_equal(found[1], integers)


def test_other_scales_have_a_store_of_another_name(graph: Path) -> None:
    first = store_name(quantized_weights(load_graph(graph).graph))
    model = onnx.load(graph)
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == "scale")
    scale.CopyFrom(numpy_helper.from_array(SCALE * 2, "scale"))
    onnx.save(model, graph)
    assert store_name(quantized_weights(load_graph(graph).graph)) != first
