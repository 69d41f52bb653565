"""In the worker: a lowered graph as TensorRT's network, its weights taken from the store's memory map."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_export.engines.tensorrt.worker_protocol import BuildRequest
from hidiff_runtime.format.dtypes import BY_NAME
from hidiff_runtime.format.manifest import TensorSpec

_TYPES = {known.tensorrt: known.name for known in BY_NAME.values()}


class NetworkRefused(Exception):  # noqa: N818 - names the outcome
    """The parser takes the graph for no network; the arguments are its words."""


class SignatureDiffers(Exception):  # noqa: N818 - names the outcome
    """The network's inputs or outputs are not those asked for; the arguments are found and wanted."""


@dataclass(frozen=True)
class Loaded:
    """A network, and everything that has to live as long.

    Args:
        builder: that made the network.
        network: the graph.
        parser: that filled it.
        store: the map of the weight store, into which the network points: no weight is copied.
    """

    builder: Any
    network: Any
    parser: Any
    store: NDArray[np.uint8] | None


def load_network(trt: Any, logger: Any, request: BuildRequest) -> Loaded:
    """Returns the lowered graph as a network.

    Raises:
        NetworkRefused: the parser does.
        OSError: a file cannot be read.
    """
    builder = trt.Builder(logger)
    # The only way to have a network's types obeyed on 10.x; 11 and RTX know no other.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    taken = parser.load_model_proto(Path(request.graph).read_bytes(), request.graph)
    store = None if request.weights is None else np.memmap(request.weights, np.uint8, "r")
    if store is not None:
        for weight in request.initializers:
            place = store[weight.offset : weight.offset + weight.nbytes]
            taken = taken and parser.load_initializer(weight.name, place.ctypes.data, weight.nbytes)
    if not taken or not parser.parse_model_proto():
        raise NetworkRefused(*(parser.get_error(index).desc() for index in range(parser.num_errors)))
    return Loaded(builder, network, parser, store)


def check_signature(network: Any, request: BuildRequest) -> None:
    """Compares names, shapes and types of what goes in and out. Raises SignatureDiffers."""
    for kind, found, wanted in (
        ("inputs", (network.get_input(index) for index in range(network.num_inputs)), request.inputs),
        ("outputs", (network.get_output(index) for index in range(network.num_outputs)), request.outputs),
    ):
        has, should = ({spec.name: str(spec) for spec in specs} for specs in (map(_spec, found), wanted))
        if has != should:
            names = sorted(name for name in {*has, *should} if has.get(name) != should.get(name))
            raise SignatureDiffers(
                kind, *(", ".join(side.get(name, "none") for name in names) for side in (has, should))
            )


def _spec(tensor: Any) -> TensorSpec:
    return TensorSpec(tensor.name, tuple(tensor.shape), _type(tensor))


def _type(tensor: Any) -> str:
    name: str = tensor.dtype.name
    return _TYPES.get(name, name.lower())


def layer_list(network: Any) -> str:
    """Returns the layers as JSON, one a line: name, type, and names, types and shapes of what goes in and out."""
    lines = (json.dumps(layer) for layer in _layers(network))
    return '{"source": "the parsed network", "layers": [\n' + ",\n".join(lines) + "\n]}\n"


def _layers(network: Any) -> Iterator[dict[str, Any]]:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        yield {
            "name": layer.name,
            "type": layer.type.name,
            "inputs": [_described(layer.get_input(i)) for i in range(layer.num_inputs)],
            "outputs": [_described(layer.get_output(i)) for i in range(layer.num_outputs)],
        }


def _described(tensor: Any) -> dict[str, Any] | None:
    """None for an input that a layer has no need of."""
    return None if tensor is None else {"name": tensor.name, "dtype": _type(tensor), "shape": list(tensor.shape)}
