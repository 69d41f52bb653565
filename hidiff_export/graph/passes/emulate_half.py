"""A half-precision graph in float32 that rounds to half precision where a half-precision engine does."""

from __future__ import annotations

import onnx_ir as ir

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.passes.float32_operations import HALVES

MOVING = frozenset(
    {
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Identity"),
        *("Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"),
    }
)
"""Operators that move numbers and compute none: what went in rounded comes out rounded."""

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class EmulateHalf(ir.passes.InPlacePass):
    """Turns a float16 or bfloat16 graph into one that computes in float32 and rounds each result to that type.

    For a runtime that has few kernels in half precision: ONNX Runtime's CPU keeps float32 between the nodes of a
    float16 graph, so that what overflows or loses digits on a GPU does not there. This graph spells it out: each node
    takes float32, and its result is cast to half precision and back. What exceeds float16's 65504 becomes an infinity.

    A node is rounded once, behind it. So nothing is rounded inside an operator that
    `hidiff_export.graph.float32_ops` has in float32: attention's scores, a softmax, a normalization's means.
    Sums within a convolution or a matrix product are float32 too.

    Requires: types known; no subgraphs; inputs and outputs of other types than float16 and bfloat16.
    Ensures: no node computes in half precision. Weights stay where and as they are stored, and are cast when read.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph."""
        nodes = tuple(model.graph)
        for node in nodes:
            for value in node.outputs:
                if value.dtype in HALVES:
                    _round(model.graph, node, value)
        stored = [value for value in model.graph.initializers.values() if value.dtype in HALVES]
        for value in stored:
            _widen(model.graph, value, nodes)
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """Checks types and subgraphs."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype in HALVES:
                raise ir.passes.PreconditionError(f"{value.name} is of {value.dtype}, expected float32")
        for node in model.graph:
            if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
                raise ir.passes.PreconditionError(f"{node.op_type} {node.name} holds a graph")
            if any(value.dtype is None for value in node.outputs if value.uses() or value.is_graph_output()):
                raise ir.passes.PreconditionError(f"the type of an output of {node.op_type} {node.name} is not known")

    def ensures(self, model: ir.Model) -> None:
        """Checks that half precision is left in casts alone."""
        for node in model.graph:
            values = (value for value in (*node.inputs, *node.outputs) if value is not None)
            if node.op_type != "Cast" and any(value.dtype in HALVES for value in values):
                raise ir.passes.PostconditionError(f"{node.op_type} {node.name} still computes in half precision")


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Lets whatever reads ``value`` read it rounded, in float32."""
    kind, uses = value.dtype, tuple(value.uses())
    assert kind is not None  # it is of half precision
    if node.op_type == "Cast":  # rounds by itself
        _read(graph, node, uses, _cast(graph, value, ir.DataType.FLOAT, "back"))
        return
    value.type = ir.TensorType(ir.DataType.FLOAT)
    _retype(node)
    if node.op_type in MOVING and not node.domain:
        return
    narrow = _cast(graph, value, kind, "half")
    graph.insert_after(node, [narrow])
    _read(graph, narrow, uses, _cast(graph, narrow.outputs[0], ir.DataType.FLOAT, "back"))


def _retype(node: ir.Node) -> None:
    """Lets attributes that name or hold a half type say float32: a dequantization's output, a constant's value."""
    kind = node.attributes.get("output_dtype")
    if kind is not None and ir.DataType(kind.as_int()) in HALVES:
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(ir.DataType.FLOAT))
    held = node.attributes.get("value")
    if held is not None and held.type is ir.AttributeType.TENSOR and (tensor := held.as_tensor()).dtype in HALVES:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype("float32")))


def _widen(graph: ir.Graph, value: ir.Value, nodes: tuple[ir.Node, ...]) -> None:
    """Casts a stored weight to float32 just before it is first read, so that it is wide no longer than needed."""
    readers = {user for user, _ in value.uses()}
    first = next((node for node in nodes if node in readers), None)
    if first is None:
        return
    uses = tuple(value.uses())
    wide = _cast(graph, value, ir.DataType.FLOAT, "wide")
    graph.insert_before(first, [wide])
    for user, position in uses:
        user.replace_input_with(position, wide.outputs[0])


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Node:
    build = NodeBuilder(graph)
    cast = build.cast(value, dtype)
    (node,) = build.nodes
    node.name = cast.name = f"{value.name}.{suffix}"
    return node


def _read(graph: ir.Graph, after: ir.Node, uses: tuple[tuple[ir.Node, int], ...], back: ir.Node) -> None:
    """Puts ``back`` behind ``after``, and its output where a value was used."""
    graph.insert_after(after, [back])
    for user, position in uses:
        user.replace_input_with(position, back.outputs[0])
