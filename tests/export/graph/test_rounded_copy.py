"""The form that portable graphs are judged by speaks of the graph, not of ONNX Runtime's kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from hidiff_export.errors import BundleError, ExportError
from hidiff_export.graph.portable import save
from hidiff_export.graph.rounded_copy import write_rounded_copy
from hidiff_runtime import backends
from hidiff_runtime.format.specs import GraphRecord, TensorSpec
from hidiff_runtime.verification.comparison import Metrics
from tests.export.graph.small import graph

SHAPE = (1, 8, 16, 16)


def group_norm(folder: Path) -> Path:
    """A portable graph of one normalization in two groups."""
    ones = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)
    path = folder / "norm.onnx"
    save(graph([node], {"x": SHAPE}, constants=ones), path)
    return path


def evaluate(path: Path, x: np.ndarray) -> np.ndarray:
    """As the judge evaluates it."""
    spec = (TensorSpec("x", SHAPE, "float32"),)
    record = GraphRecord("norm.onnx", {}, spec, (TensorSpec("y", SHAPE, "float32"),))
    options = {"optimize": False, "weights": "shared", "device": "cpu"}
    with backends.get("onnxruntime").device(options) as device, device.open(path, {}, record) as session:
        return session.run({"x": x})["y"]


@pytest.mark.parametrize(("mean", "least"), [(0, 120), (20, 110), (100, 100), (1000, 80)])
def test_a_mean_far_from_zero_is_no_fault_of_the_graph(tmp_path: Path, mean: float, least: float) -> None:
    x = (np.random.default_rng(0).standard_normal(SHAPE) + mean).astype(np.float32)
    groups = x.astype(np.float64).reshape(1, 2, -1)
    spread = np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    expected = ((groups - groups.mean(-1, keepdims=True)) / spread).reshape(SHAPE)

    write_rounded_copy(group_norm(tmp_path), tmp_path / "judged.onnx")

    found = Metrics.of(expected, evaluate(tmp_path / "judged.onnx", x)).snr_db
    assert found > least
    if mean >= 100:  # what the operator itself would have been judged by
        assert Metrics.of(expected, evaluate(tmp_path / "norm.onnx", x)).snr_db < found - 30


@pytest.mark.parametrize("kind", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("optimize", [True, False])
def test_onnx_runtime_leaves_every_rounding_where_it_stands(tmp_path: Path, kind: ir.DataType, optimize: bool) -> None:
    """No optimization takes a pair of casts for nothing; the judge leaves them off all the same."""
    casts = [
        helper.make_node("Cast", ["x"], ["narrow"], to=kind),
        helper.make_node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "factor"], ["huge"]),
        helper.make_node("Cast", ["huge"], ["narrow2"], to=kind),
        helper.make_node("Cast", ["narrow2"], ["y"], to=TensorProto.FLOAT),
    ]
    path = tmp_path / "casts.onnx"
    save(graph(casts, {"x": [3]}, constants={"factor": np.array([64], np.float32)}), path)
    spec = [TensorSpec(name, (3,), "float32") for name in ("x", "y")]
    record = GraphRecord("casts.onnx", {}, (spec[0],), (spec[1],))
    options = {"optimize": optimize, "device": "cpu"}

    with backends.get("onnxruntime").device(options) as device, device.open(path, {}, record) as session:
        found = session.run({"x": np.array([1 + 2**-12, 1023.5, 2048], np.float32)})["y"]

    half = np.inf if kind == ir.DataType.FLOAT16 else 131072
    np.testing.assert_array_equal(found, [64, 65504 if kind == ir.DataType.FLOAT16 else 65536, half])


def test_weights_are_read_from_where_they_are_stored(tmp_path: Path) -> None:
    save_file({"w": np.full((4, 4), 2, np.float16)}, tmp_path / "weights.safetensors")
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph(nodes, {"x": [1, 4]}, constants={"w": np.zeros((4, 4), np.float16)})
    content = (tmp_path / "weights.safetensors").read_bytes()
    model.graph.initializers["w"].const_value = ir.ExternalTensor(
        "weights.safetensors",
        len(content) - 32,
        32,
        ir.DataType.FLOAT16,
        shape=ir.Shape([4, 4]),
        name="w",
        base_dir=tmp_path,
    )
    save(model, tmp_path / "portable.onnx")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "weights.safetensors", elsewhere)

    write_rounded_copy(tmp_path / "portable.onnx", elsewhere / "judged.onnx")

    written = onnx.load(elsewhere / "judged.onnx", load_external_data=False)
    (weight,) = (tensor for tensor in written.graph.initializer if tensor.name == "w")
    assert {entry.key: entry.value for entry in weight.external_data}["location"] == "weights.safetensors"
    session = onnxruntime.InferenceSession(elsewhere / "judged.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.ones((1, 4), np.float32)})[0], np.full((1, 4), 8))


def test_what_is_no_graph_or_none_of_ours_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot be read") as caught:
        write_rounded_copy(broken, tmp_path / "judged.onnx")
    assert "broken.onnx" in str(caught.value.given)

    model = graph([helper.make_node("Sigmoid", ["x"], ["y"])], {"x": [3]})
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    save(model, broken)
    with pytest.raises(ExportError, match="A graph pass failed"):
        write_rounded_copy(broken, tmp_path / "judged.onnx")
