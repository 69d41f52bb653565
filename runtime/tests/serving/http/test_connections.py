"""Connections: how long each may keep the server waiting, and who goes where there is no place left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from http_server import GENERATIONS, LARGEST, PATIENCE, PROMPT, Server, eventually, proven, rest, serving, until
from uvicorn.server import ServerState

from hidiff_runtime.serving.http.access_control import AccessRules, hashed
from hidiff_runtime.serving.http.connections import PIECES, Connection, ConnectionLimits, ConnectionSlots
from hidiff_runtime.serving.http.request_bodies import SMALL, BodyLimits

POST = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
ASKED = {"prompt": PROMPT, "steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven(tmp_path_factory.mktemp("connections") / "bundle")


@pytest.fixture(scope="module")
def hasty(folder: Path) -> Iterator[Server]:
    """A server that does not wait long for a request's head."""
    with serving(folder, connections=ConnectionLimits(head_seconds=1)) as started:
        yield started


@pytest.fixture(scope="module")
def brief(folder: Path) -> Iterator[Server]:
    """A server that waits for heads, whenever a busy client gets to send one, and for nothing else."""
    limits = ConnectionLimits(head_seconds=PATIENCE, idle_seconds=1, send_seconds=0.3)
    rules = AccessRules(keys=(hashed("key"),), hosts=None, largest=LARGEST)
    with serving(folder, connections=limits, rules=rules) as started:
        yield started


def connect(server: Server, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    connection.sendall(content)
    return connection


def trickled(connection: socket.socket, piece: bytes) -> bytes:
    """What comes while this is sent again and again, until the server closes."""
    connection.settimeout(0.02)
    received, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            connection.sendall(piece)
            found = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return received
        if not found:
            return received
        received += found
    raise AssertionError(f"still open after {received!r}")


def test_a_head_that_does_not_end_is_told_and_ended(hasty: Server) -> None:
    with connect(hasty, GET[:-2]) as connection:
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"The request's head did not come within 1 seconds." in answer


def test_a_head_that_goes_on_for_ever_is_ended(hasty: Server) -> None:
    with connect(hasty, GET[:-2]) as connection:
        trickled(connection, b"a: b\r\n")


def test_who_says_nothing_is_told_nothing(hasty: Server) -> None:
    with connect(hasty) as connection:
        assert rest(connection) == b""


def test_the_next_head_has_its_time_too(hasty: Server) -> None:
    with connect(hasty, GET) as connection:
        until(connection, b"live")
        connection.sendall(GET[:-2])
        assert rest(connection).startswith(b"HTTP/1.1 408")


def test_a_connection_that_idles_is_ended_after_its_answer(brief: Server) -> None:
    with connect(brief, GET) as connection:
        assert rest(connection).startswith(b"HTTP/1.1 200")


def test_a_body_that_goes_on_after_its_refusal_is_ended(brief: Server) -> None:
    with connect(brief, f"{POST}Content-Length: {LARGEST}\r\n\r\n".encode()) as connection:
        assert trickled(connection, b"a").startswith(b"HTTP/1.1 401")


def test_what_is_no_http_after_an_answer_is_ended_without_a_word(
    brief: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(brief, f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode()) as connection:
        until(connection, b"}}")
        connection.sendall(b"no chunk\r\n")
        assert b"400" not in trickled(connection, b"")
    assert not [record for record in caplog.records if record.exc_info]


def test_what_is_no_http_is_told(brief: Server) -> None:
    with connect(brief, b"\x16\x03\x01 hello\r\n\r\n") as connection:
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"invalid_http"' in answer


def test_an_answer_that_nobody_takes_is_ended(brief: Server) -> None:
    with connect(brief) as connection:
        connection.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):  # the server stops reading, and then there is none
            while True:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    gone(brief)


def gone(server: Server) -> None:
    """Until there is no connection left."""
    state = server.front.server_state
    eventually(lambda: not state.connections and not state.tasks)


class Slow(asyncio.Transport):
    """A transport whose client takes something each time it is looked at, until it stops."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left, self.looks = 1000, looks
        self.aborted = asyncio.Event()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        if self.looks:
            self.looks -= 1
            self.left -= 1
        return self.left

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        pass


async def nobody(_scope: object, _receive: object, _send: object) -> None:
    """An application that is never asked."""


def test_an_answer_that_is_taken_slowly_is_not_ended() -> None:
    async def run() -> Slow:
        transport = Slow(looks=5)
        config = uvicorn.Config(nobody, log_config=None)
        limits = ConnectionLimits(send_seconds=0.01)
        connection = Connection(config, ServerState(), {}, places=ConnectionSlots(1), limits=limits)
        connection.connection_made(transport)
        connection.pause_writing()
        await asyncio.wait_for(transport.aborted.wait(), PATIENCE)
        connection.connection_lost(None)
        return transport

    assert asyncio.run(run()).looks == 0  # not before it stopped taking


def test_a_body_in_crumbs_is_refused(folder: Path) -> None:
    with serving(folder) as server:
        chunked = f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode()
        content = b'{"prompt": "a lighthouse", "steps": 4}'
        whole = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
        with connect(server, chunked + whole) as connection:
            assert until(connection, b"\r\n").startswith(b"HTTP/1.1 200")
        with connect(server, chunked + b"1\r\na\r\n" * (PIECES + 1)) as connection:
            answer = until(connection, b"}}")
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"too many too small pieces" in answer


def test_who_waits_longest_for_a_head_gives_its_place_away_then_who_waits_for_a_body(folder: Path) -> None:
    with serving(folder, connections=ConnectionLimits(most=2)) as server:
        half = f"{POST}Content-Length: 100\r\n\r\n{{".encode()
        with connect(server, half) as body, connect(server, GET[:-2]) as head:
            eventually(lambda: len(server.front.server_state.tasks) == 1)  # its head has been read
            with connect(server, GET) as probe:
                assert until(probe, b"live").startswith(b"HTTP/1.1 200")
                assert rest(head) == b""
                with connect(server, half):
                    assert rest(probe) == b""  # it had its answer
                    eventually(lambda: len(server.front.server_state.tasks) == 2)
                    with connect(server, GET) as second:
                        assert until(second, b"live").startswith(b"HTTP/1.1 200")
                    answer = rest(body)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 2" in answer
            assert b'"too_busy"' in answer


def test_who_waits_for_the_server_keeps_its_place(folder: Path) -> None:
    with serving(folder, connections=ConnectionLimits(most=2)) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        with server.begin(ASKED) as first, server.begin(ASKED) as second:
            server.gate.wait()
            third = pool.submit(server.get, "/health/live")
            server.gate.open()
            assert until(first, b"\r\n").startswith(b"HTTP/1.1 200")
            assert until(second, b"\r\n").startswith(b"HTTP/1.1 200")
            assert third.result().status == 200


def test_there_is_room_for_prompts_where_bodies_have_taken_all(folder: Path) -> None:
    largest = 8 * SMALL
    rules = AccessRules(keys=(), hosts=None, largest=largest)
    with serving(folder, rules=rules, bodies=BodyLimits(together=largest)) as server:
        large = f"{POST}Content-Length: {largest}\r\n\r\n".encode() + b" " * (largest - 1)
        with connect(server, large) as first, connect(server, large) as second:
            second.settimeout(PATIENCE)
            first.settimeout(0.01)
            answer = b""
            while not answer:  # one of them finds no room
                for each in (first, second):
                    each.settimeout(0.05)
                    try:
                        answer = answer or each.recv(65536)
                    except TimeoutError:
                        continue
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 2" in answer
            assert server.post(ASKED).status == 200
        server.eventually("hidiff_failures_total", 1, kind="busy")
        gone(server)
        assert server.post({**ASKED, "user": "a" * (largest - 2 * SMALL)}).status == 200  # there is room again


def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_fault(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with serving(folder) as server:
        for path in (GENERATIONS, "/v1/images/edits"):
            kind = "application/json" if path == GENERATIONS else "multipart/form-data; boundary=cut"
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
            connect(server, head.encode() + b"--cut").close()
            gone(server)
        assert server.count("hidiff_failures_total", kind="internal") == 0
    assert not caplog.records


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/sd15"])
def test_a_head_is_asked_for_wherever_a_body_is(folder: Path, path: str) -> None:
    with serving(folder) as server:
        whole, head = server.get(path), server.ask("HEAD", path)
        assert head.status == whole.status == 200
        assert head.body == b""
        assert head.headers["content-type"] == whole.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == str(len(whole.body))
        assert server.ask("HEAD", GENERATIONS).status == 405
