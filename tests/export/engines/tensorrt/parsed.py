"""The network that TensorRT-RTX's parser makes of a lowered graph: which of its layers compute on which types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Layer:
    """A layer: its kind, in ONNX's words where TensorRT has one for several, and its types."""

    kind: str
    inputs: frozenset[str]
    outputs: frozenset[str]


@dataclass(frozen=True)
class Parsed:
    """The layers of a network, and all that the parser warned of."""

    layers: Sequence[Layer]
    said: Sequence[str]

    def types(self, *kinds: str) -> set[str]:
        """Every type that goes in or out of layers of these kinds."""
        found = [layer for layer in self.layers if layer.kind in kinds]
        return {name for layer in found for name in layer.inputs | layer.outputs}

    def count(self, kind: str) -> int:
        """Number of the layers of a kind."""
        return sum(layer.kind == kind for layer in self.layers)


def parse(path: Path) -> Parsed:
    """Parses a lowered graph, which needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING and "differs from one already registered" not in message:
                said.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    return Parsed([_layer(trt, network.get_layer(index)) for index in range(network.num_layers)], said)


def _layer(trt: Any, layer: Any) -> Layer:
    inputs = (layer.get_input(index) for index in range(layer.num_inputs))
    outputs = (layer.get_output(index) for index in range(layer.num_outputs))
    return Layer(
        _kind(trt, layer),
        frozenset(tensor.dtype.name for tensor in inputs if tensor is not None),
        frozenset(tensor.dtype.name for tensor in outputs),
    )


def _kind(trt: Any, layer: Any) -> str:
    name: str = layer.type.name
    if name == "UNARY":
        layer.__class__ = trt.IUnaryLayer  # layers come as their base class
        return str(layer.op.name)
    if name == "NORMALIZATION":
        layer.__class__ = trt.INormalizationLayer
        return "GROUP_NORMALIZATION" if layer.num_groups > 1 else "LAYER_NORMALIZATION"
    return name


def check_float32_operations(network: Parsed, half: str) -> None:
    """Holds a network of 16-bit weights against the table of float32 operations.

    Args:
        network: of a UNet.
        half: TensorRT's name of the 16-bit type.
    """
    for kind in ("ATTENTION_INPUT", "ATTENTION_OUTPUT", "LAYER_NORMALIZATION", "SIN", "COS"):
        assert network.types(kind) == {"FLOAT"}, kind
    assert network.types("SOFTMAX") <= {"FLOAT"}
    assert network.types("GROUP_NORMALIZATION", "CONVOLUTION") == {half}
