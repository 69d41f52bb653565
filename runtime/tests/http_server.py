"""A toy bundle behind the real HTTP server, on loopback, with engines that a test can hold."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import toy
import toy_pictures
from PIL import Image
from toy_reference import record

from hidiff_runtime.cli.serve import listen
from hidiff_runtime.pipeline.request_values import Limits
from hidiff_runtime.serving.http.access_control import AccessRules
from hidiff_runtime.serving.http.app import create_app
from hidiff_runtime.serving.http.connections import ConnectionLimits
from hidiff_runtime.serving.http.prometheus import Prometheus
from hidiff_runtime.serving.http.request_bodies import BodyLimits
from hidiff_runtime.serving.http.server import Server as HttpServer
from hidiff_runtime.serving.http.service_loader import ServiceLoader
from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.service import Service

PROMPT = "a lighthouse"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
LARGEST = 200_000
PATIENCE = 120.0
"""Seconds for what takes none on an idle machine; no test is about time."""


class Gate:
    """Stands in the UNet of the toy: open, or letting steps through one by one."""

    def __init__(self) -> None:
        self._open = True
        self._permits = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def close(self) -> None:
        self._open = False

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        self._open = True
        self.let(1000)

    def __call__(self, outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        if "noise_pred" in outputs and not self._open:
            self.reached.release()
            assert self._permits.acquire(timeout=PATIENCE)
        return outputs

    def wait(self) -> None:
        """Until a step stands before the gate."""
        assert self.reached.acquire(timeout=PATIENCE)


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def picture(self) -> np.ndarray:
        return decoded(self.json["data"][0]["b64_json"])


@dataclass
class Server:
    """How a test talks to it."""

    port: int
    gate: Gate
    host: ServiceLoader
    folder: Path
    stop: Callable[[], None]
    front: HttpServer
    failures: list[BaseException] = field(default_factory=list)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, values: object, path: str = GENERATIONS, **headers: str) -> Answer:
        return self.ask("POST", path, json.dumps(values).encode(), **{"content_type": "application/json", **headers})

    def begin(self, values: object) -> socket.socket:
        """Sends a request for pictures and leaves the answer to whoever reads the socket."""
        body = json.dumps(values).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def count(self, name: str, **labels: str) -> float:
        """A metric's value, of all that have these labels together; 0 where it was never counted."""
        series = [line.rpartition(" ") for line in self.get("/metrics").body.decode().splitlines()]
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        own = [(told, value) for told, _, value in series if told.partition("{")[0] == name]
        return sum(float(value) for told, value in own if all(label in told for label in wanted))

    def eventually(self, name: str, value: float, **labels: str) -> None:
        """Until a metric has this value."""
        end = time.monotonic() + PATIENCE
        while (found := self.count(name, **labels)) != value:
            assert time.monotonic() < end, f"{name} is {found}, not {value}"
            time.sleep(0.01)


def refused(answer: Answer, status: int, code: str | None = None) -> str:
    """The message of an error that tells nothing of the server."""
    assert answer.status == status, answer.body
    assert answer.json.keys() == {"error"}
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 300
    shown = answer.body.decode()
    assert not re.search(r"Traceback|\.py\b|File \"|/tmp|/root|/home|/usr|site-packages|0x[0-9a-f]{6}", shown)
    if code is not None:
        assert error["code"] == code
    message: str = error["message"]
    return message


def until(connection: socket.socket, end: bytes, received: bytes = b"") -> bytes:
    """What comes until this does; it may come in any pieces."""
    while end not in received:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def eventually(true: Callable[[], bool]) -> None:
    """Until this is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes, whether or not it had read all that it was sent."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def until_refused(port: int) -> None:
    """Until nobody listens there."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
        except ConnectionResetError:  # it was waiting when the server stopped listening
            continue
        except ConnectionRefusedError:
            return


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def events(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events by name, and comments by their first word after a colon."""
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        if block.startswith(": "):
            name, _, data = block[2:].partition(" ")
            found.append((f":{name}", json.loads(data)))
        else:
            first, second = block.split("\n")
            found.append((first.removeprefix("event: "), json.loads(second.removeprefix("data: "))))
    return found


def png(colour: int = 200, size: tuple[int, int] | None = None, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    values = {"RGB": (colour, 20, 30), "L": colour, "RGBA": (0, 0, 0, colour)}
    Image.new(mode, size or (toy_pictures.WIDTH, toy_pictures.HEIGHT), values[mode]).save(content, "PNG")
    return content.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def send(server: Server, parts: dict[str, str | bytes] | list[tuple[str, str | bytes]]) -> Answer:
    """Sends a form, whose bytes are files."""
    body = b""
    for name, value in parts.items() if isinstance(parts, dict) else parts:
        file = '; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        content = value.encode() if isinstance(value, str) else value
        body += f'--cut\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return server.ask("POST", EDITS, body + b"--cut--\r\n", content_type="multipart/form-data; boundary=cut")


def proven(folder: Path, kind: toy.Toy | None = None) -> Path:
    """A bundle with reference samples."""
    toy_pictures.make(folder, kind)
    record(folder, kind or toy.Toy())
    return folder


@contextmanager
def serving(
    folder: Path,
    *,
    waiting: int = 4,
    seconds: float = PATIENCE,
    rules: AccessRules | None = None,
    limits: Limits | None = None,
    connections: ConnectionLimits | None = None,
    bodies: BodyLimits | None = None,
    before: Callable[[], object] = lambda: None,
    ready: bool = True,
    resident: str = "current",
    dynamic_batching: bool = False,
    grace: int = round(PATIENCE),
) -> Iterator[Server]:
    """A server of the bundle, ready unless that is left to the test.

    Args:
        before: called before the bundle is opened, in the thread that opens it.
        grace: seconds for what runs when the server is told to stop.
    """
    gate, prometheus, failures = Gate(), Prometheus(), list[BaseException]()
    meter, opened = MetricsRecorder(prometheus), threading.Event()

    def open_service() -> Service:
        before()
        return Service.open(
            folder, backend=toy_pictures.Backend(spoil=gate), meter=meter, limits=limits, resident=resident
        )

    def failed(error: BaseException) -> None:
        failures.append(error)
        opened.set()

    host = ServiceLoader(
        open_service,
        meter,
        waiting=waiting,
        dynamic_batching=dynamic_batching,
        failed=failed,
        ready=lambda _: opened.set(),
    )
    rules = rules or AccessRules(keys=(), hosts=None, largest=LARGEST)
    app = create_app(host, meter, prometheus.registry, rules=rules, seconds=seconds, bodies=bodies)
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    front = HttpServer(app, listening, connections or ConnectionLimits(), grace=grace)
    thread = threading.Thread(target=front.run)
    thread.start()

    def stop() -> None:
        front.should_exit = True
        thread.join()

    try:
        if ready:
            assert opened.wait(PATIENCE)
        yield Server(port, gate, host, folder, stop, front, failures)
    finally:
        gate.open()
        stop()
