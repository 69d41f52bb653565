"""Ways to ask the tests' Triton server for a picture, and the server that the figures are of."""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc
import tritonclient.http

from hidiff_export.triton.repository import RepositoryPlan, write
from hidiff_runtime.format.manifest import Manifest
from tests.deploy import clients
from tests.deploy.clients import MODEL, STREAM, events, inputs, post
from tests.deploy.server import TritonServer

OPTIONS: dict[str, str | int | bool] = {"resident": "all", "threads": 1}
PROMPT = "a lighthouse at dusk, waves, oil on canvas"

Ask = Callable[[Any, int, int], bytes]
"""Asks by a client, with seed and steps; the PNG file."""


@dataclass(frozen=True)
class Way:
    """A way to ask.

    Args:
        name: in tables.
        connect: opens a client of a server.
        ask: one request.
        exact: whether it gives the PNG file itself, and not in base64.
    """

    name: str
    connect: Callable[[TritonServer], Any]
    ask: Ask
    exact: bool = True


def _infer(module: Any) -> Ask:
    def ask(client: Any, seed: int, steps: int) -> bytes:
        answer = client.infer(MODEL, inputs(module, prompt=PROMPT, seed=seed, steps=steps))
        return bytes(answer.as_numpy("image")[0, 0])

    return ask


def _stream(client: Any, seed: int, steps: int) -> bytes:
    """On a stream that stays open."""
    client.send(inputs(tritonclient.grpc, prompt=PROMPT, seed=seed, steps=steps))
    content = b""
    while True:
        result, error = client.arrived.get(timeout=120)
        if error is not None:
            raise error
        response = result.get_response()
        if response.outputs and (image := result.as_numpy("image")) is not None:
            content = bytes(image[0, 0])
        if response.parameters["triton_final_response"].bool_param:
            return content


def _generate(server: TritonServer, seed: int, steps: int) -> bytes:
    """With a connection of its own, and the picture in base64."""
    body = {"prompt": PROMPT, "seed": seed, "steps": steps, "output": "base64"}
    status, content = post(server, f"{STREAM}/generate_stream", body)
    if status != 200:
        raise RuntimeError(content)
    return str(events(content)[-1]["image"]).encode()


class Stream:
    """A client of the stream model."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.arrived: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: self.arrived.put((result, error)))

    def send(self, given: list[Any]) -> None:
        """Asks on the open stream."""
        self._client.async_stream_infer(STREAM, given, enable_empty_final_response=True)


@contextmanager
def _streaming(server: TritonServer) -> Iterator[Stream]:
    with clients.grpc(server) as client:
        yield Stream(client)
        client.stop_stream()


@contextmanager
def _none(server: TritonServer) -> Iterator[TritonServer]:
    yield server


WAYS = (
    Way("HTTP", clients.http, _infer(tritonclient.http)),
    Way("gRPC", clients.grpc, _infer(tritonclient.grpc)),
    Way("stream over gRPC", _streaming, _stream),
    Way("stream over HTTP", _none, _generate, exact=False),
)


@contextmanager
def serving(bundle: Path) -> Iterator[TritonServer]:
    """A server of the bundle that has drawn its first pictures."""
    with tempfile.TemporaryDirectory(prefix="hidiff-load-", dir=bundle.parent) as folder:
        write(bundle, Path(folder) / "models", RepositoryPlan(options=OPTIONS))
        with TritonServer(Path(folder) / "models", Path(folder)) as server:
            for way in WAYS:
                with way.connect(server) as client:
                    way.ask(client, 0, min(Manifest.read(bundle).steps))
            yield server
