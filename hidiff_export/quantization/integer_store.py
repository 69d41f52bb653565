"""Weights as the integers that a quantized graph makes of them, in a store of their own beside the network's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from hidiff_runtime.format.safetensors import SafetensorsWriter, TensorInfo, TensorLayout


@dataclass(frozen=True)
class IntegerStore:
    """A store of integers.

    Args:
        path: of the safetensors file.
        infos: where each weight lies, by the weight's name in the graph.
    """

    path: Path
    infos: Mapping[str, TensorInfo]


def quantized_weights(graph: ir.Graph) -> dict[str, ir.Node]:
    """Returns the ``QuantizeLinear`` node of each weight that is quantized to int8, by the weight's name."""
    return {
        node.inputs[0].name or "": node
        for node in graph
        if node.op_type == "QuantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
        and node.outputs[0].dtype is ir.DataType.INT8
    }


def store_name(nodes: Mapping[str, ir.Node]) -> str:
    """Returns the file name of the store of these weights: another one for other weights, or other scales."""
    told = hashlib.sha256()
    for name, node in sorted(nodes.items()):
        told.update(f"{name} {_weight(node).shape} {_axis(node)} ".encode())
        told.update(_scale(node).tobytes())
    return f"weights.int8-{told.hexdigest()[:8]}.safetensors"


def write_integers(nodes: Mapping[str, ir.Node], path: Path, report: Callable[[float], None]) -> IntegerStore:
    """Writes a store: each weight divided by its scales in float32, rounded to the nearest even integer, within int8.

    That is what the node computes (ONNX's ``QuantizeLinear`` with ``precision`` float32).

    Args:
        nodes: what `quantized_weights` found.
        path: to write.
        report: told which part is done.

    Raises:
        StorageError: the disk refuses.
    """
    layouts = {name: TensorLayout("I8", _weight(node).shape) for name, node in nodes.items()}
    writer = SafetensorsWriter(path, layouts)
    with writer:
        for index, name in enumerate(writer.order):
            report(index / len(layouts))
            writer.add(name, _integers(nodes[name]))
    return IntegerStore(path, writer.infos)


def read_integers(model: ir.Model, store: IntegerStore) -> None:
    """Has a graph take its weights from the store, in place; what quantized them is gone."""
    for name, node in quantized_weights(model.graph).items():
        info = store.infos[name]
        value = ir.Value(name=f"{name}.int8", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(info.shape))
        value.const_value = ir.ExternalTensor(
            store.path.name,
            info.offset,
            info.nbytes,
            ir.DataType.INT8,
            shape=ir.Shape(info.shape),
            name=f"{name}.int8",
            base_dir=store.path.parent,
        )
        model.graph.initializers[f"{name}.int8"] = value
        node.outputs[0].replace_all_uses_with(value)
    common.RemoveUnusedNodesPass()(model)


def _integers(node: ir.Node) -> NDArray[Any]:
    values = _weight(node).astype(np.float32)
    around = [1] * values.ndim
    around[_axis(node)] = -1
    scaled: NDArray[Any] = np.rint(values / _scale(node).astype(np.float32).reshape(around))
    return scaled.clip(-128, 127).astype(np.int8)


def _weight(node: ir.Node) -> NDArray[Any]:
    """Returns the weight, mapped."""
    return _constant(node.inputs[0])


def _scale(node: ir.Node) -> NDArray[Any]:
    return _constant(node.inputs[1])


def _constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None  # a node that `quantized_weights` found has both
    assert value.const_value is not None
    found: NDArray[Any] = value.const_value.numpy()
    return found


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 1
