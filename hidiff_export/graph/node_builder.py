"""The one way to make nodes and constants: recorded on a tape, their shapes and types as ONNX derives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import ArrayLike, DTypeLike


class NodeBuilder:
    """Nodes that are to join a graph, in the order in which they are made, and initializers that join it at once.

    An output gets the shape and type that ONNX derives from the inputs; neither where an input's type is not known.

    Args:
        graph: that the nodes are for; its opsets say which version of an operator is meant.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._tape = ir.tape.Tape()
        self._constants: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """Lists what was made, in order."""
        return self._tape.nodes

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        shape: Sequence[int] | None = None,
        type: ir.TypeProtocol | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Makes a node with one output.

        Args:
            op_type: of the operator.
            inputs: in order; None for an optional one that is left out.
            domain: of the operator.
            shape: of the output of an operator that ONNX does not define; ``type`` likewise.
            attributes: by name.
        """
        (value,) = self._record(op_type, inputs, attributes, 1, domain)
        if domain:
            value.shape, value.type = None if shape is None else ir.Shape(shape), type
        return value

    def multi_op(self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Any) -> Sequence[ir.Value]:
        """Makes a node with this many outputs."""
        return self._record(op_type, inputs, attributes, outputs)

    def copy(self, node: ir.Node, *inputs: ir.Value | None) -> ir.Value:
        """Makes a node like one with one output, on other inputs."""
        (value,) = self._record(node.op_type, inputs, node.attributes, 1, node.domain)
        return value

    def constant(self, content: ArrayLike, dtype: DTypeLike = np.int64, name: str | None = None) -> ir.Value:
        """Makes an initializer, or gives the one that this builder made of the same content.

        Args:
            content: numbers of any shape.
            dtype: the NumPy type to store them in.
            name: by default a provisional one.
        """
        tensor = ir.tensor(np.asarray(content, dtype))
        key = (tensor.dtype, tuple(tensor.numpy().shape), tensor.tobytes())
        if key not in self._constants:
            tensor.name = name or self._free_name()
            self._constants[key] = self.initializer(tensor)
        return self._constants[key]

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Makes an initializer of a named tensor, which may lie in a file."""
        value = self._tape.initializer(tensor)
        self._graph.register_initializer(value)
        return value

    def reshape(self, value: ir.Value | None, shape: Sequence[int]) -> ir.Value:
        """Makes a ``Reshape`` to a static shape."""
        return self.op("Reshape", value, self.constant(shape))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Makes a ``Cast``, unless the value is of this type."""
        return value if value.dtype == dtype else self.op("Cast", value, to=dtype)

    def _record(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        # Sequences are of whole numbers, which the tape finds out last, after slow checks of what else they may be.
        typed = {
            name: ir.AttrInt64s(name, it) if isinstance(it, list | tuple) else it for name, it in attributes.items()
        }
        values = self._tape.op_multi_out(op_type, inputs, typed, num_outputs=outputs, domain=domain)
        node = values[0].producer()
        if not domain and node is not None:
            _infer(node, self._graph.opset_imports[domain])
        return values

    def _free_name(self) -> str:
        count = len(self._graph.initializers)
        while (name := f"constant_{count}") in self._graph.initializers:
            count += 1
        return name


def _infer(node: ir.Node, opset: int) -> None:
    """Gives a node's outputs the shapes and types that its operator's definition derives from the inputs'."""
    inputs = {f"input{index}": value for index, value in enumerate(node.inputs) if value is not None}
    if any(value.type is None for value in inputs.values()):
        return
    # What a shape may follow from: sizes, axes, lengths of pieces.
    constants = ((name, value.const_value) for name, value in inputs.items())
    sizes = {name: tensor for name, tensor in constants if tensor is not None and tensor.dtype == ir.DataType.INT64}
    # Not by ir.to_proto, which takes ten times as long to find out what it is given.
    proto = onnx.NodeProto(
        op_type=node.op_type,
        input=["" if value is None else f"input{index}" for index, value in enumerate(node.inputs)],
        output=[f"output{index}" for index in range(len(node.outputs))],
        attribute=[ir.serde.serialize_attribute(attribute) for attribute in node.attributes.values()],
    )
    found = onnx.shape_inference.infer_node_outputs(
        onnx.defs.get_schema(node.op_type, opset),
        proto,
        {name: ir.serde.serialize_value(value, name=name).type for name, value in inputs.items()},
        {name: ir.serde.serialize_tensor(tensor) for name, tensor in sizes.items()},
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )
    for name, value in zip(proto.output, node.outputs, strict=True):
        if name in found:
            value.shape = ir.serde.deserialize_type_proto_for_shape(found[name])
            value.type = ir.serde.deserialize_type_proto_for_type(found[name])
