"""What clients can cost the server's process before they ask for anything, and how the process ends."""

from __future__ import annotations

import json
import resource
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from http_process import PATIENCE, Process, started
from http_server import eventually, proven, rest, until, until_refused

HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
FULL = "places for connections are taken (--connections)"
FILE = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
ASKED = json.dumps({"prompt": "a lighthouse", "steps": 4}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven(tmp_path_factory.mktemp("process") / "bundle")


def test_heads_that_do_not_end_keep_nobody_from_being_answered(folder: Path, tmp_path: Path) -> None:
    with started(folder, tmp_path, descriptors=128) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(200)]
        for client in clients:
            client.sendall(HALF_A_HEAD)
        assert server.probe() == 200
        assert rest(clients[0]) == b""  # the oldest gave its place away
        assert server.descriptors() < 128
        said = server.said()
        assert said.count(f"All 64 {FULL}") == 1
        assert len(said) < 1000
        clients[-1].sendall(b"\r\n")
        assert until(clients[-1], b"\r\n").startswith(b"HTTP/1.1 200")  # while it was good


def test_a_process_without_descriptors_says_so_once_and_closes_what_waits(folder: Path, tmp_path: Path) -> None:
    with started(folder, tmp_path) as server, ExitStack() as stack:
        few = server.descriptors() + 8
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (few, few))
        clients = [stack.enter_context(server.connect()) for _ in range(60)]
        for client in clients:
            client.sendall(HALF_A_HEAD)
        assert server.probe() == 200
        told = [line for line in server.said().splitlines() if "No connection can be accepted" in line]
        assert len(told) == 1
        assert told[0].endswith("the limit on open files is too low.")
        assert "Traceback" not in server.said()


def test_bodies_that_do_not_end_take_no_more_memory_than_there_is_for_them(folder: Path, tmp_path: Path) -> None:
    megabyte = 2**20
    options = ("--limit", f"image_bytes={2 * megabyte}", "--body-memory", str(18 * megabyte))
    with started(folder, tmp_path, *options) as server, ExitStack() as stack:
        before = server.memory()
        for _ in range(20):
            client = stack.enter_context(server.begin(9 * megabyte))
            client.settimeout(PATIENCE)
            try:
                for _ in range(8):
                    client.sendall(b"a" * megabyte)
            except ConnectionError:
                continue  # refused, and closed for going on
        assert server.probe() == 200
        assert server.memory("VmHWM") - before < 80  # of 160 MiB that were sent


def test_memory_of_bodies_is_given_back(folder: Path, tmp_path: Path) -> None:
    content = FILE + b"a" * (20 * 2**20) + b"\r\n--cut--\r\n"

    def send(server: Process) -> None:
        sent = server.begin(len(content), content, path="/v1/images/edits", kind="multipart/form-data; boundary=cut")
        with sent as client:
            assert b"is too large" in until(client, b"}}")

    with started(folder, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        before = server.memory()
        for _ in range(3):
            list(pool.map(send, [server] * 8))
        assert server.memory("VmHWM") - before > 60
        eventually(lambda: server.memory() - before < 40)


def test_stops_at_once_where_half_a_body_is_on_the_way(folder: Path, tmp_path: Path) -> None:
    with started(folder, tmp_path, "--grace", "3600", "--body-timeout", "3600") as server:
        with server.begin(1000, b'{"prompt": ') as client:
            assert server.probe() == 200
            server.signal(signal.SIGTERM)
            answer = until(client, b"}}")
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"The server is stopping: ask again." in answer
            assert server.end() == 0
        assert "Traceback" not in server.said()


@contextmanager
def drawing(
    folder: Path, tmp_path: Path, *, grace: int, clients: int = 1
) -> Iterator[tuple[Process, list[socket.socket]]]:
    """A server that holds a picture in the middle, and whom it draws it for; the others wait."""
    with started(folder, tmp_path, "--grace", str(grace)) as server, ExitStack() as stack:
        server.hold.touch()
        asking = [stack.enter_context(server.begin(len(ASKED), ASKED)) for _ in range(clients)]
        assert server.probe() == 200
        yield server, asking


def told_that_it_stopped(client: socket.socket) -> bool:
    answer = until(client, b"}}")
    return answer.startswith(b"HTTP/1.1 503") and b'"stopped"' in answer


@pytest.mark.parametrize("thrice", [False, True])
def test_a_second_interrupt_ends_what_is_drawn_and_what_waits_without_a_traceback(
    folder: Path, tmp_path: Path, thrice: bool
) -> None:
    with drawing(folder, tmp_path, grace=3600, clients=5) as (server, clients):
        server.signal(signal.SIGINT)
        until_refused(server.port)
        server.signal(signal.SIGINT)
        assert all(told_that_it_stopped(client) for client in clients)
        if thrice:  # it does not wait for the step either
            server.signal(signal.SIGINT)
        else:
            server.hold.unlink()
        assert server.end() == 130
        assert "Traceback" not in server.said()


def test_what_takes_longer_than_the_grace_is_told_so(folder: Path, tmp_path: Path) -> None:
    with drawing(folder, tmp_path, grace=1) as (server, (client,)):
        server.signal(signal.SIGTERM)
        assert told_that_it_stopped(client)
        server.hold.unlink()
        assert server.end() == 0
        assert "Traceback" not in server.said()


def test_pictures_that_are_drawn_are_finished_at_a_signal(folder: Path, tmp_path: Path) -> None:
    with drawing(folder, tmp_path, grace=3600) as (server, (client,)):
        server.signal(signal.SIGTERM)
        until_refused(server.port)
        server.hold.unlink()
        assert until(client, b"\r\n").startswith(b"HTTP/1.1 200")
        assert server.end() == 0
