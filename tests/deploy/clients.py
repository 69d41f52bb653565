"""What clients of the tests send, and what they read of the answers."""

from __future__ import annotations

import io
import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from PIL import Image

from hidiff_runtime.serving.triton.schema import INPUTS
from tests.deploy.server import TritonServer

MODEL, STREAM = "hidiff", "hidiff_stream"

_TYPES = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_INT64": ("INT64", np.int64),
    "TYPE_FP64": ("FP64", np.float64),
    "TYPE_BOOL": ("BOOL", np.bool_),
}


def inputs(module: Any, rows: int = 1, **values: Any) -> list[Any]:
    """The inputs of a request.

    Args:
        module: ``tritonclient.http`` or ``tritonclient.grpc``.
        values: by input; a list has one for each row, anything else is for every row.
    """
    datatypes = {tensor.name: _TYPES[tensor.datatype] for tensor in INPUTS}
    made = []
    for name, value in values.items():
        datatype, dtype = datatypes[name]
        each = value if isinstance(value, list) else [value] * rows
        array = np.array([[one.encode() if isinstance(one, str) else one] for one in each], dtype)
        made.append(module.InferInput(name, list(array.shape), datatype))
        made[-1].set_data_from_numpy(array)
    return made


@contextmanager
def http(server: TritonServer) -> Iterator[Any]:
    """A client over HTTP."""
    client = tritonclient.http.InferenceServerClient(server.http, network_timeout=300, connection_timeout=300)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def grpc(server: TritonServer) -> Iterator[Any]:
    """A client over gRPC."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc)
    try:
        yield client
    finally:
        client.close()


def stream(client: Any, *, rows: int = 1, **values: Any) -> list[dict[str, NDArray[Any]]]:
    """All messages of one streamed request over gRPC, each its outputs by name.

    Raises:
        tritonclient.utils.InferenceServerException: the request failed.
    """
    arrived: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    found = []
    try:
        given = inputs(tritonclient.grpc, rows, **values)
        client.async_stream_infer(STREAM, given, enable_empty_final_response=True)
        final = False
        while not final:
            result, error = arrived.get(timeout=300)
            if error is not None:
                raise error
            response = result.get_response()
            final = response.parameters["triton_final_response"].bool_param
            if response.outputs:
                found.append({output.name: result.as_numpy(output.name) for output in response.outputs})
    finally:
        client.stop_stream()
    return found


def post(server: TritonServer, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Status and content of a plain request with JSON, such as anybody may make without a client library."""
    request = urllib.request.Request(f"http://{server.http}/v2/models/{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def picture(content: bytes) -> Image.Image:
    """The picture in the bytes of a PNG file, decoded."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def same(one: Any, other: Any) -> bool:
    """Whether two pictures have the same pixels."""
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def events(content: bytes) -> Sequence[dict[str, Any]]:
    """The JSON objects of server-sent events."""
    parts = content.decode().split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts if part]
