"""The beginning of a phase's graph as a graph of its own, by which backends are timed on the machine that serves."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from hidiff_export.errors import ExportError
from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.onnx_dtypes import DTYPE_NAMES
from hidiff_export.graph.passes.base import static_shape
from hidiff_export.graph.portable import load_graph, run_passes, save
from hidiff_runtime.format.manifest import TensorSpec

OUTPUT = "features"
"""Name of the graph's output: what the first transformer gives."""

_TRANSFORMER = re.compile(r"(down_blocks\.\d+\.attentions\.0)[./]")


def write_leading_layers(phase: Path, path: Path) -> None:
    """Writes what a phase computes up to its first transformer, with its convolutions, products and attention.

    Weights stay where they are, and inputs that only later layers take are left out.

    Args:
        phase: a portable graph of the UNet.
        path: of the new graph, in the same folder.

    Raises:
        ExportError: the graph has no transformer in a down block.
    """
    model = load_graph(phase)
    graph = model.graph
    last = _end_of_first_transformer(graph, phase)
    builder = NodeBuilder(graph)
    output = builder.cast(last, ir.DataType.FLOAT)
    graph.extend(builder.nodes)
    for index, node in enumerate(builder.nodes):
        node.name = f"{OUTPUT}/{node.op_type}_{index}"
    output.name = OUTPUT
    graph.outputs.clear()
    graph.outputs.append(output)
    run_passes(model, ir.passes.Sequential(common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass()), path.name)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    save(model, path)


def leading_layers_signature(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Returns the inputs and the outputs of such a graph."""
    graph = ir.load(path).graph
    return tuple(map(_spec, graph.inputs)), tuple(map(_spec, graph.outputs))


def _spec(value: ir.Value) -> TensorSpec:
    shape = static_shape(value)
    assert shape is not None  # `write_leading_layers` wrote it
    assert value.name is not None
    assert value.dtype is not None
    return TensorSpec(value.name, shape, DTYPE_NAMES[value.dtype])


def _end_of_first_transformer(graph: ir.Graph, phase: Path) -> ir.Value:
    """Returns what the last node of the first transformer gives."""
    module, last = "", None
    for node in graph:
        found = _TRANSFORMER.match(node.name or "")
        if found and found[1] == (module or found[1]):
            module, last = found[1], node.outputs[0]
    if last is None:
        raise ExportError("The graph has no transformer in a down block, to time backends by.", given=phase)
    return last
