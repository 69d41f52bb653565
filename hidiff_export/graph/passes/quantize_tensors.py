"""Q/DQ nodes where calibration says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from hidiff_export.graph.node_builder import NodeBuilder
from hidiff_export.graph.quantized_tensor import QuantizedTensor


class QuantizeTensors(ir.passes.InPlacePass):
    """Puts ``QuantizeLinear`` and ``DequantizeLinear`` between tensors and the nodes that read them in few bits.

    Weights are quantized in the graph, from the weight store's own bytes: no second copy of them is written. Backends
    fold that when they build.

    Tensors are divided by their scales in float32: in float16, the default for scales of that type, quotients would be
    rounded twice. ONNX Runtime does what the node states; TensorRT-RTX accepts it, and builds the same plan without.

    Requires: nodes in topological order with distinct names; opset 23 or later.
    Ensures: one pair of nodes for each of ``tensors``, which ``uses`` read, and nothing else.

    Args:
        tensors: what to quantize.
        kind: ``ir.DataType.INT8`` or ``FLOAT8E4M3FN``.
    """

    def __init__(self, tensors: Iterable[QuantizedTensor], kind: ir.DataType) -> None:
        super().__init__()
        self._tensors = tuple(tensors)
        self._kind = kind

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inserts the nodes. Raises PreconditionError where the graph does not read a tensor where it should."""
        nodes = {node.name or "": node for node in model.graph}
        order = {name: place for place, name in enumerate(nodes)}
        for number, tensor in enumerate(self._tensors):
            for name, position in tensor.uses:
                value = nodes[name].inputs[position] if name in nodes else None
                if value is None or value.name != tensor.tensor:
                    raise ir.passes.PreconditionError(f"Input {position} of {name} is not {tensor.tensor}.")
            first = min((name for name, _ in tensor.uses), key=order.__getitem__)
            pair = self._insert(model.graph, tensor, nodes[first])
            for node in pair:
                # Names must differ even before they are given for good.
                node.name = f"{first.rpartition('/')[0]}/{node.op_type}_{number}"
                node.metadata_props.update(nodes[first].metadata_props)
            for name, position in tensor.uses:
                nodes[name].replace_input_with(position, pair[-1].outputs[0])
        return ir.passes.PassResult(model, modified=bool(self._tensors))

    def _insert(self, graph: ir.Graph, tensor: QuantizedTensor, before: ir.Node) -> Sequence[ir.Node]:
        value = next(value for value in before.inputs if value is not None and value.name == tensor.tensor)
        scale = np.array(tensor.scale, np.float16)
        scale = scale if tensor.axis is not None else scale.reshape(())
        axis: dict[str, Any] = {} if tensor.axis is None else {"axis": tensor.axis}
        build = NodeBuilder(graph)
        parameters = [build.constant(scale, scale.dtype), build.constant(np.zeros(scale.shape), self._kind.numpy())]
        few = build.op("QuantizeLinear", value, *parameters, **axis, precision=int(ir.DataType.FLOAT))
        build.op("DequantizeLinear", few, *parameters, **axis)
        graph.insert_before(before, build.nodes)
        return build.nodes
