"""Phases as branches of one engine, built by TensorRT-RTX: attention in one kernel, weights once, and its record."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from hidiff_export.build.tensorrt.merged import lower_merged
from hidiff_export.engines.protocol import PortableGraph
from hidiff_export.engines.tensorrt.builder import TensorRtBuilder
from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX
from hidiff_export.graph.merge import merge
from hidiff_export.graph.passes.attention_in_branches import AttentionInBranches
from hidiff_export.graph.passes.decompose_attention import DecomposeAttention
from hidiff_export.graph.portable import save
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.format.manifest import PhaseRecord, TensorSpec
from hidiff_runtime.phases import Phase, PhaseKind

pytestmark = pytest.mark.needs("tensorrt-rtx")

HEADS, SIZE, TOKENS = 4, 64, 2048
WIDTH = HEADS * SIZE
SCORES = HEADS * TOKENS * TOKENS
KINDS = (PhaseKind.STRIDED, PhaseKind.WINDOWED)

# Prints what the library says of the engine's memory and kernels, or why there is no engine.
BUILD = """
import json, re, sys
import tensorrt_rtx as trt
facts = {"scratch": None, "weights": None, "fused": 0, "errors": []}
class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, text):
        if severity == trt.ILogger.Severity.ERROR:
            facts["errors"].append(text)
        for fact, words in (("scratch", "Max Scratch Memory"), ("weights", "Total Weights Memory")):
            if found := re.match(words + ": ([0-9]+) bytes", text):
                facts[fact] = int(found[1])
        if text.startswith("Layers:"):
            facts["fused"] = len(re.findall("(?m)^Name: _gemm_mha", text))
logger = Logger()
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
builder.build_serialized_network(network, config)
print(json.dumps(facts))
"""


def phase(factor: float, kind: int = TensorProto.FLOAT16, seed: int = 0) -> ir.Model:
    """Self-attention between linear layers, float32 in and out; the factor is what phases differ in."""
    random = np.random.default_rng(seed)
    constants = [
        helper.make_tensor(name, kind, (WIDTH, WIDTH), (random.standard_normal(WIDTH**2) / 16).tolist())
        for name in ("to_q", "to_k", "to_v", "to_out")
    ]
    constants += [
        numpy_helper.from_array(np.array([0, 0, HEADS, SIZE], np.int64), "heads"),
        numpy_helper.from_array(np.array([0, 0, WIDTH], np.int64), "joined"),
        helper.make_tensor("factor", kind, (), [factor]),
    ]
    nodes = [helper.make_node("Cast", ["x"], ["narrow"], to=kind)]
    nodes.append(helper.make_node("Mul", ["narrow", "factor"], ["scaled"]))
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["scaled", f"to_{name}"], [f"{name}0"]),
            helper.make_node("Reshape", [f"{name}0", "heads"], [f"{name}1"]),
            helper.make_node("Transpose", [f"{name}1"], [name], perm=[0, 2, 1, 3]),
        ]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["a0"]),
        helper.make_node("Transpose", ["a0"], ["a1"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["a1", "joined"], ["a2"]),
        helper.make_node("MatMul", ["a2", "to_out"], ["a3"]),
        helper.make_node("Cast", ["a3"], ["y"], to=TensorProto.FLOAT),
    ]
    shape = [1, TOKENS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "phase",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    common.ShapeInferencePass()(model)
    for index, node in enumerate(model.graph):
        node.name = f"node{index}"
    return model


def facts(model: ir.Model, folder: Path) -> dict[str, Any]:
    """What the library says when it builds the model."""
    save(model, folder / "model.onnx")
    command = [sys.executable, "-c", BUILD, str(folder / "model.onnx")]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def both(*passes: ir.passes.PassBase, kind: int = TensorProto.FLOAT16) -> ir.Model:
    """Two phases, changed by the passes, as branches."""
    models = {"one": phase(1.0, kind), "other": phase(0.5, kind)}
    for model in models.values():
        for graph_pass in (*passes, common.RemoveUnusedNodesPass()):
            graph_pass(model)
    return merge(models)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["float16", "bfloat16"])
def test_attention_is_one_kernel_in_each_branch_and_stores_no_scores(kind: int, tmp_path: Path) -> None:
    found = facts(lower_merged({"one": phase(1.0, kind), "other": phase(0.5, kind)}), tmp_path)
    assert found["errors"] == []
    assert found["fused"] == 2
    assert found["scratch"] < SCORES


def test_pieces_are_kernels_too(tmp_path: Path) -> None:
    found = facts(both(AttentionInBranches(SCORES // 4)), tmp_path)
    assert found["fused"] == 8
    assert found["scratch"] < SCORES


def test_products_of_float32_alone_would_store_the_scores(tmp_path: Path) -> None:
    """So the figures above do tell one from the other."""
    found = facts(both(DecomposeAttention(SCORES), kind=TensorProto.FLOAT), tmp_path)
    assert found["errors"] == []
    assert found["fused"] == 0
    assert found["scratch"] > 2 * SCORES


def test_the_operator_itself_does_not_build_in_a_branch(tmp_path: Path) -> None:
    """When this fails, the library has learnt it, and `AttentionInBranches` has had its day."""
    found = facts(both(), tmp_path)
    assert "myelinOpSetInput" in str(found["errors"])


def silent(_done: float, _total: float, _note: str) -> None:
    """Shows nothing."""


def portable(folder: Path, kinds: Sequence[PhaseKind]) -> list[PortableGraph]:
    """Phases on the disk."""
    graphs = []
    spec = TensorSpec("x", (1, TOKENS, WIDTH), "float32"), TensorSpec("y", (1, TOKENS, WIDTH), "float32")
    for index, kind in enumerate(kinds):
        record = PhaseRecord(f"{kind.value}.onnx", {}, spec[:1], spec[1:], phase=Phase(kind))
        save(phase(1.0 + index), folder / record.graph)
        graphs.append(PortableGraph(folder / record.graph, record))
    return graphs


def test_the_builder_writes_one_record_for_all_phases(tmp_path: Path) -> None:
    builder = TensorRtBuilder(TENSORRT_RTX, ("sm89",), merged=True)
    graphs = portable(tmp_path, KINDS)
    record = tmp_path / "merged.tensorrt-rtx.json"
    assert builder.engines(graphs) == (record, record)
    written = builder.build(graphs, silent)
    assert {path.name for path in written} == {
        record.name,
        "merged.tensorrt-rtx.layers.json",
        "merged.tensorrt-rtx.plan",
    }
    found = PlanRecord.read(record)
    assert found.phases == ("strided", "windowed")
    assert found.selectors == ("select_windowed",)
    assert [spec.name for spec in found.inputs] == ["x"]
    assert found.selected("windowed") == {"select_windowed": True}
    assert found.selected("strided") == {"select_windowed": False}


def test_weights_are_in_the_engine_once(tmp_path: Path) -> None:
    weights = 4 * WIDTH * WIDTH * 2
    assert weights <= facts(both(AttentionInBranches()), tmp_path)["weights"] < 1.1 * weights
    unlike = lower_merged({"one": phase(1.0), "other": phase(0.5, seed=1)})
    assert facts(unlike, tmp_path)["weights"] > 1.9 * weights


def test_one_phase_alone_is_not_merged(tmp_path: Path) -> None:
    builder = TensorRtBuilder(TENSORRT_RTX, ("sm89",), merged=True)
    graphs = portable(tmp_path, KINDS[:1])
    assert [path.name for path in builder.engines(graphs)] == ["strided.tensorrt-rtx.json"]
