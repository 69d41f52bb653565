"""Requests that end early: clients that go away, deadlines, a full queue, a server that stops."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_server import PATIENCE, PROMPT, Server, decoded, events, proven, serving, until, until_refused

from hidiff_runtime.serving import service
from hidiff_runtime.serving.http import job_queue, queued_job

ASKED = {"prompt": PROMPT, "steps": 4, "seed": 1}
STREAMED = {**ASKED, "stream": True}
CANCELLED, PICTURES, FAILED = "hidiff_cancellations_total", "hidiff_pictures_total", "hidiff_failures_total"
STEPS = ("strided_pooled", "strided", "windowed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven(tmp_path_factory.mktemp("cancelling") / "bundle")


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as started:
        yield started


def completed(received: bytes) -> dict[str, Any]:
    """The last event of a stream, whatever pieces it was sent in."""
    data = received[received.rindex(b'data: {"type": "image_generation.completed"') + 6 :]
    found: dict[str, Any] = json.loads(data[: data.index(b"}\n\n") + 1])
    return found


def steps_of(server: Server) -> float:
    return sum(server.count("hidiff_step_seconds_count", phase=phase) for phase in STEPS)


@pytest.mark.parametrize("asked", [ASKED, STREAMED, {**ASKED, "n": 3}], ids=["whole", "stream", "several"])
def test_a_client_that_goes_away_ends_its_run_at_the_next_step(server: Server, asked: dict[str, Any]) -> None:
    expected = server.post(ASKED).picture
    before = steps_of(server)
    server.gate.close()
    connection = server.begin(asked)
    server.gate.wait()
    server.gate.let(1)
    server.gate.wait()  # in the second step
    connection.close()
    following = server.begin(STREAMED)
    received = until(following, b": accepted")  # by then the server has seen the first one go
    server.gate.open()
    while chunk := following.recv(4096):
        received += chunk
    following.close()
    assert np.array_equal(decoded(completed(received)["b64_json"]), expected)
    server.eventually(CANCELLED, 1)
    assert server.count(PICTURES) == 2  # the first and the last alone
    assert steps_of(server) == before + 2 + 4


def test_nothing_is_cancelled_while_clients_stay(server: Server) -> None:
    for asked in (ASKED, STREAMED):
        assert server.post(asked).status == 200
    assert (server.count(CANCELLED), server.count(PICTURES)) == (0, 2)


@pytest.mark.parametrize("asked", [ASKED, STREAMED], ids=["whole", "stream"])
def test_a_client_that_goes_away_while_it_waits_takes_its_request_back(server: Server, asked: dict[str, Any]) -> None:
    server.gate.close()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, ASKED)
        server.gate.wait()
        first, second = server.begin(asked), server.begin(STREAMED)
        until(second, b": accepted")  # by then the first waits too
        first.close()
        server.eventually(CANCELLED, 1)
        second.close()
        server.eventually(CANCELLED, 2)
        assert not running.done()
        server.gate.open()
        assert running.result().status == 200
    assert server.count(PICTURES) == 1


def test_requests_that_wait_are_all_answered_each_with_its_own_picture(server: Server) -> None:
    expected = {seed: server.post({**ASKED, "seed": seed}).picture for seed in range(4)}
    server.gate.close()
    with ThreadPoolExecutor(4) as pool:
        found = {seed: pool.submit(server.post, {**ASKED, "seed": seed}) for seed in range(4)}
        server.gate.open()
        for seed, answer in found.items():
            assert np.array_equal(answer.result().picture, expected[seed])
    assert not np.array_equal(expected[0], expected[1])


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(folder: Path) -> None:
    with serving(folder, waiting=1) as server, ThreadPoolExecutor(2) as pool:
        server.gate.close()
        running = pool.submit(server.post, ASKED)
        server.gate.wait()
        waiting = server.begin(STREAMED)
        until(waiting, b": accepted")
        answer = server.post(ASKED)
        assert answer.status == 429
        assert answer.json["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        waiting.close()
        server.eventually(CANCELLED, 1)
        taken = pool.submit(server.post, ASKED)  # the place is free again
        server.gate.open()
        assert (running.result().status, taken.result().status) == (200, 200)


class Clock:
    """The time as the server's runs see it, which a test lets pass."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (job_queue, queued_job, service):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(queued_job, "QUIET", 0.02)  # how often who waits looks at the time
    return made


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_run(server: Server, clock: Clock, stream: bool) -> None:
    server.gate.close()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, {**ASKED, "stream": stream})
        server.gate.wait()
        clock.passed = 2 * PATIENCE
        answer = running.result()
    if stream:
        name, data = events(answer.body)[-1]
        assert (answer.status, name, data["error"]["code"]) == (200, "error", "timeout")
    else:
        assert (answer.status, answer.json["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
    server.gate.open()
    server.eventually(FAILED, 1, kind="expired")
    assert (server.count(CANCELLED), server.count(PICTURES)) == (0, 0)


def test_a_deadline_ends_waiting(server: Server, clock: Clock) -> None:
    server.gate.close()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, ASKED)
        server.gate.wait()
        with server.begin(STREAMED) as waiting:
            received = until(waiting, b": accepted")
            clock.passed = 2 * PATIENCE
            assert b'"timeout"' in until(waiting, b'"timeout"', received)
        server.eventually(FAILED, 1, kind="expired")  # the one that waited; the other stands before the gate
        server.gate.open()
        assert running.result().status == 504
    server.eventually(FAILED, 2, kind="expired")


def test_an_engine_that_fails_is_told_and_the_next_request_is_unharmed(server: Server) -> None:
    expected = server.post(ASKED).picture
    backend = server.host.worker.service.pipeline.bundle._engines.backend
    backend.spoil = lambda outputs, _call: {
        name: array * (np.nan if name == "noise_pred" else 1) for name, array in outputs.items()
    }
    answer = server.post(ASKED)
    assert (answer.status, answer.json["error"]["code"]) == (500, "engine_error")
    assert "NaN" in answer.json["error"]["message"]
    assert str(server.folder) not in answer.body.decode()
    name, data = events(server.post(STREAMED).body)[-1]
    assert (name, data["error"]["code"]) == ("error", "engine_error")
    backend.spoil = server.gate
    assert np.array_equal(server.post(ASKED).picture, expected)
    assert server.count(FAILED, kind="engine") == 2


def test_a_fault_of_the_server_is_told_to_its_operator_alone(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def fault(_outputs: dict[str, np.ndarray], _call: int) -> dict[str, np.ndarray]:
        raise RuntimeError("/secret/path is broken")

    backend = server.host.worker.service.pipeline.bundle._engines.backend
    backend.spoil = fault
    answer = server.post(ASKED)
    assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")
    streamed = server.post(STREAMED)
    assert events(streamed.body)[-1][1]["error"]["code"] == "internal_error"
    assert b"secret" not in answer.body + streamed.body
    assert "/secret/path is broken" in caplog.text
    backend.spoil = server.gate
    assert server.post(ASKED).status == 200
    assert server.count(FAILED, kind="internal") == 2


def test_a_server_that_stops_finishes_what_runs_and_takes_no_more(server: Server) -> None:
    server.gate.close()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, ASKED)
        server.gate.wait()
        stopping = pool.submit(server.stop)
        until_refused(server.port)
        server.gate.open()
        assert running.result().status == 200
        stopping.result()


def test_a_server_that_stops_cancels_what_takes_longer_than_its_grace(folder: Path) -> None:
    with serving(folder, grace=1) as server:
        server.gate.close()
        connection = server.begin(STREAMED)
        server.gate.wait()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        received = b""
        while chunk := connection.recv(4096):  # until the server gives up on it
            received += chunk
        connection.close()
        server.gate.open()
        stopping.join()
    assert b"completed" not in received
