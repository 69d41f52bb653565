"""Tails of what TensorRT-RTX really builds: two phases of a small network over the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hidiff_export.engines.tensorrt.shared_weights import share_tails
from hidiff_runtime.backends.tensorrt.mapped_parts import map_parts

pytest.importorskip("tensorrt_rtx")

CHANNELS, DEPTH = 256, 3

# The library keeps state from one build to the next, so each is a process of its own.
BUILD = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1]), parser.get_error(0).desc()
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
with open(sys.argv[2], "wb") as file:
    file.write(builder.build_serialized_network(network, config))
"""


def phase(strided: bool, seed: int = 0) -> onnx.ModelProto:
    """Convolutions, the first over every second row and column if ``strided``, and the map brought back at the end."""
    random = np.random.default_rng(seed)
    weights = [random.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float16) / 48 for _ in range(DEPTH)]
    constants = {f"weight{index}": weight for index, weight in enumerate(weights)}
    nodes = []
    if strided:
        constants |= {
            name: np.array(value, np.int64)
            for name, value in {"from": [0, 0], "to": [64, 64], "axes": [2, 3], "step": [2, 2]}.items()
        }
        constants["scales"] = np.array([1, 1, 2, 2], np.float32)
        nodes.append(helper.make_node("Slice", ["x", "from", "to", "axes", "step"], ["map0"]))
    for index in range(DEPTH):
        source = f"map{index}" if index or strided else "x"
        name = f"map{index + 1}" if index + 1 < DEPTH or strided else "y"
        nodes.append(helper.make_node("Conv", [source, f"weight{index}"], [name], pads=[1] * 4))
    if strided:
        nodes.append(helper.make_node("Resize", [f"map{DEPTH}", "", "scales"], ["y"], mode="nearest"))
    shape = [1, CHANNELS, 64, 64]
    graph = helper.make_graph(
        nodes,
        "phase",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def build(model: onnx.ModelProto, plan: Path) -> bytes:
    """Builds a plan and returns its bytes."""
    graph = plan.with_suffix(".onnx")
    onnx.save(model, graph)
    subprocess.run([sys.executable, "-c", BUILD, str(graph), str(plan)], check=True, timeout=600)
    return plan.read_bytes()


def test_phases_share_their_weights_and_other_weights_are_not_shared(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.tensorrt-rtx.plan" for name in ("strided", "windowed", "other")]
    models = (phase(strided=True), phase(strided=False), phase(strided=False, seed=1))
    contents = [build(model, path) for model, path in zip(models, paths, strict=True)]
    weights = DEPTH * CHANNELS * CHANNELS * 9 * 2

    parts = share_tails(paths, weights * 9 // 10)

    strided, windowed, other = (parts[path] for path in paths)
    assert strided[1:] == windowed[1:]
    assert strided[1].stat().st_size >= weights
    assert other == (paths[2],)
    for path, content in zip(paths, contents, strict=True):
        assert map_parts(parts[path]) == content
