"""Small graphs, and what they compute before and after a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes import common

from hidiff_export.graph.passes.base import MICROSOFT

Shape = Sequence[int]
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str] = ("y",),
    constants: Mapping[str, np.ndarray] | None = None,
    integers: Sequence[str] = (),
) -> ir.Model:
    """A model with every shape known; inputs are float32, or int32 where named in ``integers``."""
    made = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(name, TensorProto.INT32 if name in integers else TensorProto.FLOAT, shape)
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = ir.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))
    if not any("Sequence" in node.op_type for node in nodes):  # whose types onnx_ir confuses with their elements'
        common.ShapeInferencePass()(model)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"block/{node.op_type}{index}"
    return model


def random_feeds(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers; for integers, small ones from 0."""
    random = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        shape = [int(size) for size in value.shape]
        normal = random.standard_normal(shape).astype(np.float32)
        feeds[value.name] = normal if value.dtype == ir.DataType.FLOAT else np.arange(shape[0], dtype=np.int32) % 3
    return feeds


def evaluate(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime makes of the graph as it stands, none of its own rewriting on top."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def operators(model: ir.Model) -> Counter[str]:
    """How many nodes of each type there are."""
    return Counter(node.op_type for node in model.graph)


def apply(
    model: ir.Model, *passes: ir.passes.PassBase, before: Callable[[ir.Model], Sequence[np.ndarray]] | None = None
) -> Counter[str]:
    """Runs passes and checks that the graph is valid and computes what it did; returns its operators."""
    feeds = random_feeds(model)
    wanted = before(model) if before else evaluate(model, feeds)
    for graph_pass in passes:
        graph_pass(model)
    common.RemoveUnusedNodesPass()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for found, due in zip(evaluate(model, feeds), wanted, strict=True):
        assert found.shape == due.shape
        np.testing.assert_allclose(found, due, rtol=2e-5, atol=2e-6)
    return operators(model)
