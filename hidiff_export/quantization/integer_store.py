"""Weights as the integers that a quantized graph makes of them, for a store of their own beside the network's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from hidiff_export.graph.derived_store import DerivedStore


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
        told.update(f"{name} {tuple(_constant(node.inputs[0]).shape)} {_axis(node)} ".encode())
        told.update(_constant(node.inputs[1]).tobytes())
    return f"weights.int8-{told.hexdigest()[:8]}.safetensors"


def integer_tensors(nodes: Mapping[str, ir.Node]) -> dict[str, ir.TensorProtocol]:
    """Returns each weight divided by its scales in float32, rounded to the nearest even integer, within int8.

    That is what the node computes (ONNX's ``QuantizeLinear`` with ``precision`` float32). Tensors are computed when
    they are read.

    Args:
        nodes: what `quantized_weights` found.
    """
    return {
        name: ir.LazyTensor(
            partial(_integers, _constant(node.inputs[0]), _constant(node.inputs[1]), _axis(node)),
            ir.DataType.INT8,
            ir.Shape(_constant(node.inputs[0]).shape.numpy()),
            name=name,
        )
        for name, node in nodes.items()
    }


def read_integers(model: ir.Model, store: DerivedStore) -> None:
    """Has a graph take its weights from the store, in place; what quantized them is gone."""
    for name, node in quantized_weights(model.graph).items():
        tensor = store.reference(name)
        tensor.name = f"{name}.int8"
        value = ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.INT8), shape=tensor.shape)
        value.const_value = tensor
        model.graph.initializers[f"{name}.int8"] = value
        node.outputs[0].replace_all_uses_with(value)
    common.RemoveUnusedNodesPass()(model)


def _integers(weight: ir.TensorProtocol, scale: ir.TensorProtocol, axis: int) -> ir.TensorProtocol:
    values = weight.numpy().astype(np.float32)
    around = [1] * values.ndim
    around[axis] = -1
    scaled: NDArray[Any] = np.rint(values / scale.numpy().astype(np.float32).reshape(around))
    return ir.tensor(scaled.clip(-128, 127).astype(np.int8))


def _constant(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None  # a node that `quantized_weights` found has a weight and its scale
    assert value.const_value is not None
    return value.const_value


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 1
