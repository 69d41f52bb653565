"""The process in which NVIDIA ModelOpt measures ranges: ``python -m hidiff_export.quantization.worker``.

A process of its own, because ModelOpt replaces functions of ONNX Runtime for good and holds the weights several times.
ModelOpt's own graph is not kept: it holds copies of the weights, and all that is new in it are the places and scales of
its QuantizeLinear nodes, which are what the answer, ``done``, lists.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hidiff_export.child_process import Channel
from hidiff_export.graph.quantized_tensor import QuantizedTensor, fp8_tensor
from hidiff_export.quantization.layers import OPERATORS
from hidiff_export.recipe.field_types import Precision
from hidiff_runtime.format.safetensors import SafetensorsFile

SEPARATOR = "|"
"""Between the number of an evaluation and the name of an input, in the file of calibration inputs."""


class Evaluations:
    """Inputs for a calibrator; what ONNX Runtime calls a ``CalibrationDataReader``."""

    def __init__(self, path: Path) -> None:
        self._evaluations: dict[str, dict[str, NDArray[Any]]] = {}
        file = SafetensorsFile.open(path)
        for key in file.names():
            number, _, name = key.partition(SEPARATOR)
            self._evaluations.setdefault(number, {})[name] = np.array(file.array(key))
        self.rewind()

    def rewind(self) -> None:
        """Begins anew."""
        self._left = iter(self._evaluations.values())

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Gives the inputs of the next evaluation, None after the last."""
        return next(self._left, None)

    def get_first(self) -> dict[str, NDArray[Any]]:
        """Gives the inputs of the first evaluation."""
        return next(iter(self._evaluations.values()))


def measure(request: dict[str, Any]) -> onnx.ModelProto:
    """Makes the graph with ModelOpt's QuantizeLinear and DequantizeLinear nodes.

    ``modelopt.onnx.quantization.quantize`` itself begins by dropping the shapes and types of all tensors, which ONNX's
    own inference does not find again behind GroupNormalization; the functions it calls take the graph as it is. Ranges
    are the largest magnitudes ("max"): the other method, entropy, keeps every activation in memory at once.
    """
    module = importlib.import_module(f"modelopt.onnx.quantization.{request['precision']}")
    model: onnx.ModelProto = module.quantize(
        onnx_path=request["graph"],
        calibration_method="max",
        calibration_data_reader=Evaluations(Path(request["evaluations"])),
        calibration_eps=["cpu"],
        op_types_to_quantize=sorted(OPERATORS),
        nodes_to_quantize=[f"{re.escape(name)}$" for name in request["layers"]],
        nodes_to_exclude=[],
        use_external_data_format=True,
        intermediate_generated_files=[],
        high_precision_dtype="fp32",  # that is: leave the other tensors' types alone
        passes=[],
        log_level="ERROR",
        enable_gemv_detection_for_trt=False,
    )
    return model


def places(model: onnx.ModelProto) -> tuple[QuantizedTensor, ...]:
    """Finds what a graph with QuantizeLinear and DequantizeLinear nodes reads in few bits.

    Raises:
        ValueError: a zero point is not zero, or a scale is computed.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sources = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    uses: dict[str, list[tuple[str, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            uses.setdefault(name, []).append((node.name, position))
    found = []
    for node in model.graph.node:
        source = sources.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is None:
            continue
        scale, zero = (constants.get(name) for name in source.input[1:3])
        if scale is None or zero is None or any(np.frombuffer(_bytes(zero), np.uint8)):
            raise ValueError(f"{source.name} is not symmetric")
        values = onnx.numpy_helper.to_array(scale).reshape(-1).astype(np.float64).tolist()
        axis = next((attribute.i for attribute in source.attribute if attribute.name == "axis"), None)
        axis = axis if len(scale.dims) == 1 else None
        found.append(QuantizedTensor(source.input[0], tuple(values), axis, tuple(uses.get(node.output[0], ()))))
    return tuple(found)


def _bytes(tensor: onnx.TensorProto) -> bytes:
    return tensor.raw_data or bytes(value & 0xFF for value in tensor.int32_data)


def main() -> None:
    """Answers one request."""
    channel = Channel()
    request = channel.request()
    tensors = places(measure(request))
    if request["precision"] == Precision.FP8.value:
        tensors = tuple(map(fp8_tensor, tensors))
    channel.send("done", tensors=[asdict(tensor) for tensor in tensors])


if __name__ == "__main__":
    main()
