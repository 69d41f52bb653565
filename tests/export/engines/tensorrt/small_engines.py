"""Engines of a few layers, which the real library builds in a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from hidiff_export.engines.tensorrt.libraries import TENSORRT_RTX, BuilderLibrary
from hidiff_export.engines.tensorrt.worker_process import ask
from hidiff_export.engines.tensorrt.worker_protocol import BuildRequest, Initializer
from hidiff_runtime.format.manifest import TensorSpec

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}

Tensors = Sequence[tuple[str, str, Sequence[int]]]
"""Name, type and shape of inputs or outputs."""


def model(nodes: Sequence[onnx.NodeProto], inputs: Tensors, outputs: Tensors, *weights: TensorProto) -> onnx.ModelProto:
    """A graph of opset 23."""
    values = [[helper.make_tensor_value_info(n, TYPES[t], s) for n, t, s in tensors] for tensors in (inputs, outputs)]
    graph = helper.make_graph(nodes, "small", *values, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def square() -> onnx.ModelProto:
    """``c = a * a``."""
    node = helper.make_node("Mul", ["a", "a"], ["c"])
    return model([node], [("a", "float32", [4])], [("c", "float32", [4])])


def attention(size: int, dtype: str = "float16") -> onnx.ModelProto:
    """Attention of four heads of ``size`` channels."""
    shape = [1, 4, 64, size]
    node = helper.make_node("Attention", ["q", "k", "v"], ["o"], name="attend")
    return model([node], [(name, dtype, shape) for name in "qkv"], [("o", dtype, shape)])


def linear(folder: Path, weight: np.ndarray[Any, Any]) -> tuple[onnx.ModelProto, Initializer]:
    """``c = a @ w`` in the weight's type, and where the weight is: it goes to the file ``w.bin`` in the folder."""
    dtype = weight.dtype.name
    place = Initializer("w", 64, weight.nbytes)
    tensor = TensorProto(name="w", data_type=TYPES[dtype], dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", place.offset), ("length", place.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    (folder / "w.bin").write_bytes(bytes(place.offset) + weight.tobytes())
    node = helper.make_node("MatMul", ["a", "w"], ["c"])
    rows, columns = weight.shape
    return model([node], [("a", dtype, [2, rows])], [("c", dtype, [2, columns])], tensor), place


def request(folder: Path, graph: onnx.ModelProto, **changed: Any) -> BuildRequest:
    """What it takes to build ``graph`` for sm89, with some of it changed."""
    path = folder / "small.onnx"
    path.write_bytes(graph.SerializeToString())
    made = BuildRequest(
        graph=str(path),
        weights=None,
        initializers=(),
        targets=("sm89",),
        inputs=specs(graph.graph.input),
        outputs=specs(graph.graph.output),
        plan=str(folder / "small.plan"),
        layers=str(folder / "small.layers.json"),
    )
    return replace(made, **changed)


def specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """The graph's inputs or outputs as a record lists them."""
    names = {number: name for name, number in TYPES.items()}
    tensors = [(value.name, value.type.tensor_type) for value in values]
    return tuple(
        TensorSpec(name, tuple(dim.dim_value for dim in tensor.shape.dim), names[tensor.elem_type])
        for name, tensor in tensors
    )


def build(
    made: BuildRequest,
    library: BuilderLibrary = TENSORRT_RTX,
    progress: Callable[[float, str], None] = lambda _fraction, _note: None,
) -> dict[str, Any]:
    """The worker's answer."""
    return ask(library, "small.tensorrt-rtx", made.to_json(), progress)
