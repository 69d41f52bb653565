"""Graphs whose weights lie behind symbolic links, which OpenVINO does not follow out of the graph's folder.

Such a graph is given without its weights: they are inputs in what OpenVINO reads, and become constants over this
process's own mapping of the store afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_runtime.backends.openvino.quiet_import import openvino
from hidiff_runtime.backends.protobuf_wire import whole_at, wire_field, wire_fields, wire_number
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.codec import REBUILD
from hidiff_runtime.format.regular_files import open_regular

_GRAPH, _INITIALIZER, _INPUT = 7, 5, 11
"""Fields that lead from a model to its initializers, and to its graph's inputs."""

_DIMS, _DATA_TYPE, _NAME, _EXTERNAL = 1, 2, 8, 13
"""Fields of a tensor."""

_NUMPY = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 16: np.uint16}
"""Types of arrays by ONNX' numbers of types; numpy has no bfloat16, the last."""

_BFLOAT16 = 16


@dataclass(frozen=True)
class StoredTensor:
    """Where a graph's weight lies.

    Args:
        name: in the graph.
        data_type: ONNX' number of it.
        shape: static.
        path: of the store.
        offset: of the first byte in it.
        length: in bytes.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


def read_linked(core: Any, graph: Path, targets: Mapping[str, Path]) -> tuple[Any, list[Any]]:
    """Reads a graph whose weights lie behind links.

    Args:
        core: OpenVINO's.
        graph: the ONNX file.
        targets: where the stores lie by the names that the graph has for them.

    Returns:
        OpenVINO's model, and the mappings that it reads, which must stay as long as it does.

    Raises:
        EngineError: it is not a readable graph, or names other files.
        RuntimeError: OpenVINO refuses it.
    """
    stored: list[StoredTensor] = []
    try:
        with open_regular(graph) as file:
            content = _detached(file.read(), targets, stored)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError("A graph cannot be read.", given=f"{graph}: {error}", advice=REBUILD) from error
    model = core.read_model(content)
    maps = {path: _mapped(path) for path in {tensor.path for tensor in stored}}
    parameters = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
    for tensor in stored:
        parameter = parameters[tensor.name]
        parameter.output(0).replace(_constant(tensor, maps[tensor.path][1]).output(0))
        model.remove_parameter(parameter)
    return model, [*maps.values()]


def _mapped(path: Path) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    """Maps a file for reading; the array calls itself writable, which OpenVINO wants of memory that it shares."""
    with open_regular(path) as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    address = np.frombuffer(content, np.uint8).ctypes.data
    return content, np.ctypeslib.as_array((ctypes.c_uint8 * len(content)).from_address(address))


def _constant(tensor: StoredTensor, store: Any) -> Any:
    array = store[tensor.offset : tensor.offset + tensor.length].view(_NUMPY[tensor.data_type]).reshape(tensor.shape)
    library = openvino()
    if tensor.data_type == _BFLOAT16:
        return library.op.Constant(library.Tensor(array, library.Shape(tensor.shape), library.Type.bf16))
    return library.op.Constant(array, shared_memory=True)


def _detached(model: bytes, targets: Mapping[str, Path], stored: list[StoredTensor]) -> bytes:
    """Returns the model with an input for each weight that lies in a store, and adds where it lies to ``stored``."""
    parts = []
    for number, start, content, end in wire_fields(model):
        if number != _GRAPH or content is None:
            parts.append(model[start:end])
            continue
        graph = model[content:end]
        inner = []
        for field, first, body, last in wire_fields(graph):
            tensor = _stored(graph[body:last], targets) if field == _INITIALIZER and body is not None else None
            if tensor is not None:
                stored.append(tensor)
            inner.append(graph[first:last] if tensor is None else wire_field(_INPUT, _value_info(tensor)))
        parts.append(wire_field(_GRAPH, b"".join(inner)))
    return b"".join(parts)


def _stored(message: bytes, targets: Mapping[str, Path]) -> StoredTensor | None:
    """Reads where a tensor lies; None where the message itself has its data. Raises KeyError and ValueError."""
    entries: dict[str, str] = {}
    name, data_type, dims = "", 0, list[int]()
    for number, start, content, end in wire_fields(message):
        if number == _EXTERNAL and content is not None:
            pair = [message[content:end][first:last].decode() for first, last in _texts(message[content:end])]
            entries[pair[0]] = pair[1]
        elif number == _NAME and content is not None:
            name = message[content:end].decode()
        elif number == _DATA_TYPE:
            data_type = whole_at(message, start)
        elif number == _DIMS:
            dims += [whole_at(message, start)] if content is None else _packed(message[content:end])
    if not entries:
        return None
    place = targets[Path(entries["location"]).as_posix()]
    return StoredTensor(name, data_type, tuple(dims), place, int(entries.get("offset", 0)), int(entries["length"]))


def _texts(entry: bytes) -> Iterator[tuple[int, int]]:
    """Yields where key and value of an entry are."""
    return ((content, end) for _, _, content, end in wire_fields(entry) if content is not None)


def _packed(content: bytes) -> list[int]:
    """Returns whole numbers that are written one after another."""
    found, value, shift = [], 0, 0
    for byte in content:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(value)
            value, shift = 0, 0
    return found


def _value_info(tensor: StoredTensor) -> bytes:
    """Returns what an input of this name, type and shape is described by."""
    sizes = b"".join(wire_field(1, wire_number(1, size)) for size in tensor.shape)
    described = wire_number(1, tensor.data_type) + wire_field(2, sizes)
    return wire_field(1, tensor.name.encode()) + wire_field(2, wire_field(1, described))
