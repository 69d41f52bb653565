"""What the builder says of each graph: in which precision OpenVINO compiles it, and which nodes apart from the rest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hidiff_export.engines.openvino import AS_TRACED, OpenVinoBuilder, compile_record
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.graph.portable import load_graph
from hidiff_runtime.backends.openvino.compile_record import CompileRecord
from hidiff_runtime.format.manifest import GraphRecord


def graph(path: Path, dtype: int, *, quantized: bool = False) -> Path:
    """A network with a sinusoid of its input in float32, all else in ``dtype``."""
    nodes = [
        helper.make_node("Sin", ["timestep"], ["sine"], name="time_proj/Sin"),
        helper.make_node("Cast", ["sine"], ["cast"], name="Cast", to=dtype),
        helper.make_node("Add", ["cast", "bias"], ["sum"], name="Add"),
    ]
    if quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["sum", "scale"], ["few"], name="Q"),
            helper.make_node("DequantizeLinear", ["few", "scale"], ["more"], name="DQ"),
        ]
    nodes.append(helper.make_node("Cast", ["more" if quantized else "sum"], ["noise_pred"], name="Out", to=1))
    values = np.ones(4, np.float32)
    constants = [
        helper.make_tensor(name, dtype, values.shape[: 1 - scalar], values[: 4 - 3 * scalar])
        for name, scalar in (("bias", 0), ("scale", 1))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("timestep", "noise_pred")]
    made = helper.make_graph(nodes, "small", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


@pytest.mark.parametrize(
    ("dtype", "quantized", "precision"),
    [
        (TensorProto.FLOAT, False, "float32"),
        (TensorProto.BFLOAT16, False, "bfloat16"),
        (TensorProto.FLOAT16, False, "float32"),  # the CPU has none
        (TensorProto.FLOAT16, True, "bfloat16"),
    ],
)
def test_the_precision_is_that_of_the_graphs_tensors(
    dtype: int, quantized: bool, precision: str, tmp_path: Path
) -> None:
    path = graph(tmp_path / "strided.onnx", dtype, quantized=quantized)
    assert compile_record(load_graph(path), path.name) == CompileRecord("strided.onnx", precision, ("time_proj/Sin",))


def test_the_record_lies_beside_the_graph(tmp_path: Path) -> None:
    path = graph(tmp_path / "strided.onnx", TensorProto.BFLOAT16)
    portable = PortableGraph(path, GraphRecord("unet/strided.onnx", {}, (), ()))
    lowered, record = OpenVinoBuilder().build([portable], lambda *_: None)
    assert record == tmp_path / "strided.openvino.json"
    assert lowered == tmp_path / "strided.openvino.onnx"
    assert (record,) == OpenVinoBuilder().engines([portable])
    assert json.loads(record.read_text())["graph"] == lowered.name
    assert CompileRecord.read(record) == compile_record(load_graph(lowered), lowered.name)


def test_what_is_computed_apart_is_the_sinusoids() -> None:
    assert {"Sin", "Cos"} == AS_TRACED
