"""Runs that end early on the real server: cancelled by a client, at a deadline, or in a queue that is full."""

from __future__ import annotations

import http.client
import json
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException

from hidiff_export.triton.model_config import Queue
from hidiff_export.triton.repository import RepositoryPlan, write
from hidiff_runtime import Pipeline
from tests.deploy.clients import MODEL, STREAM, grpc, inputs, picture, same, stream
from tests.deploy.clients import http as plain
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"
FULL, WAITED = "Exceeds maximum queue size", "Request timeout expired"
ROWS, STEPS = 8, 24
"""Of a request that takes a while, and of all its rows."""


@pytest.fixture(scope="module")
def wanted(sd15_bundle: Path) -> Image.Image:
    """What the pipeline draws with seed 11."""
    with Pipeline.open(sd15_bundle) as pipe:
        image: Image.Image = pipe(PROMPT, seed=11)
    return image


@pytest.fixture
def unharmed(served: TritonServer, wanted: Image.Image) -> Iterator[None]:
    """After the test, either model draws the pipeline's picture."""
    yield
    with grpc(served) as client:
        answer = client.infer(MODEL, inputs(tritonclient.grpc, prompt=PROMPT, seed=11))
        messages = stream(client, prompt=PROMPT, seed=11)
    assert same(picture(answer.as_numpy("image")[0, 0]), wanted)
    assert same(picture(messages[-1]["image"][0, 0]), wanted)


def count(server: TritonServer, what: str, label: str = "") -> float:
    """The sum of a counter."""
    return sum(value for name, value in server.measured(what).items() if label in name)


def steps(server: TritonServer) -> float:
    """Steps that were made so far."""
    return count(server, "hidiff_step_seconds_count")


def pending(server: TritonServer) -> float:
    """Requests that wait in Triton's queues."""
    return count(server, "nv_inference_pending_request_count")


def until(true: Callable[[], bool]) -> None:
    """Waits for something that must come to be."""
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def cut_short(server: TritonServer) -> Iterator[None]:
    """What goes on inside ends a run of 24 steps before its end: counted as cancelled, and no step comes after."""
    before = steps(server), count(server, "hidiff_cancellations_total"), count(server, "hidiff_failures_total")
    yield
    until(lambda: count(server, "hidiff_cancellations_total") == before[1] + 1)
    made = steps(server) - before[0]
    assert made < STEPS
    with grpc(server) as client:  # waits for whatever still runs
        client.infer(MODEL, inputs(tritonclient.grpc, prompt=PROMPT))
    assert steps(server) - before[0] == made + STEPS / ROWS
    assert count(server, "hidiff_failures_total") == before[2]


@pytest.mark.usefixtures("unharmed")
def test_a_cancelled_request_of_the_front_ends_at_the_next_step(served: TritonServer) -> None:
    told: queue.Queue[Any] = queue.Queue()
    with grpc(served) as client, cut_short(served):
        before = steps(served)
        given = inputs(tritonclient.grpc, ROWS, prompt=PROMPT)
        call = client.async_infer(MODEL, given, lambda result, error: told.put((result, error)))
        until(lambda: steps(served) > before)
        call.cancel()
        result, error = told.get(timeout=300)
    assert result is None
    assert error.status() == "StatusCode.CANCELLED"


@pytest.mark.usefixtures("unharmed")
def test_a_cancelled_stream_ends_at_the_next_step(served: TritonServer) -> None:
    told: queue.Queue[Any] = queue.Queue()
    with grpc(served) as client, cut_short(served):
        client.start_stream(lambda result, error: told.put((result, error)))
        client.async_stream_infer(STREAM, inputs(tritonclient.grpc, ROWS, prompt=PROMPT))
        first, error = told.get(timeout=300)
        client.stop_stream(cancel_requests=True)
    assert error is None
    assert first.as_numpy("event")[0, 0] == b"progress"
    rest = [told.get() for _ in range(told.qsize())]
    assert [str(error.status()) for _, error in rest if error is not None] == ["StatusCode.CANCELLED"]


@pytest.mark.usefixtures("unharmed")
def test_a_request_that_is_not_cancelled_makes_every_step(served: TritonServer) -> None:
    """The control of what `cut_short` counts."""
    before = steps(served), count(served, "hidiff_cancellations_total")
    with grpc(served) as client:
        client.infer(MODEL, inputs(tritonclient.grpc, ROWS, prompt=PROMPT))
    assert steps(served) - before[0] == STEPS
    assert count(served, "hidiff_cancellations_total") == before[1]


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("model", [MODEL, STREAM])
def test_what_is_cancelled_while_it_waits_makes_no_step(served: TritonServer, model: str) -> None:
    told: queue.Queue[Any] = queue.Queue()
    before = steps(served)
    with grpc(served) as client, grpc(served) as other, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.infer, MODEL, inputs(tritonclient.grpc, ROWS, prompt=PROMPT))
        until(lambda: steps(served) > before)
        given, waiting = inputs(tritonclient.grpc, prompt=PROMPT), pending(served)
        if model == MODEL:
            call = other.async_infer(MODEL, given, lambda result, error: told.put((result, error)))
            until(lambda: pending(served) > waiting)
            call.cancel()
        else:
            other.start_stream(lambda result, error: told.put((result, error)))
            other.async_stream_infer(STREAM, given)
            until(lambda: pending(served) > waiting)
            other.stop_stream(cancel_requests=True)
        first.result(300)
        assert told.get(timeout=300)[0] is None
        client.infer(MODEL, inputs(tritonclient.grpc, prompt=PROMPT))  # had to wait for both
    assert steps(served) - before == STEPS + STEPS / ROWS


@pytest.mark.usefixtures("unharmed")
def test_an_http_client_that_hangs_up_is_not_noticed(served: TritonServer) -> None:
    """Triton does not tell its models; whoever wants to cancel uses gRPC, or hidiff-serve."""
    before = steps(served), count(served, "hidiff_pictures_total")
    connection = http.client.HTTPConnection(served.http, timeout=300)
    tensors = {"name": "prompt", "shape": [ROWS, 1], "datatype": "BYTES", "data": [[PROMPT]] * ROWS}
    connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensors]}))
    until(lambda: steps(served) > before[0])
    connection.close()
    until(lambda: count(served, "hidiff_pictures_total") == before[1] + ROWS)
    assert steps(served) - before[0] == STEPS


@pytest.mark.usefixtures("unharmed")
def test_a_deadline_ends_a_run_that_has_begun(served: TritonServer) -> None:
    """However fast the machine is at that moment: deadlines are tried until one comes after the first step."""
    microseconds, made = 10_000, 0.0
    with grpc(served) as client:

        def begun_and_ended() -> bool:
            nonlocal microseconds, made
            before = steps(served), count(served, "hidiff_failures_total", 'kind="expired"')
            told: queue.Queue[Any] = queue.Queue()
            given = inputs(tritonclient.grpc, ROWS, prompt=PROMPT)
            client.async_infer(MODEL, given, lambda result, error: told.put(error), timeout=microseconds)  # noqa: ARG005 - tritonclient names it
            error = told.get(timeout=300)
            made = steps(served) - before[0]
            if error is None:
                microseconds = max(1, microseconds // 2)
                return False
            microseconds = microseconds * 3 // 2
            assert error.status() == "StatusCode.UNAVAILABLE"
            if made:
                assert "The deadline passed" in str(error.message())
                assert count(served, "hidiff_failures_total", 'kind="expired"') == before[1] + 1
            return made > 0

        until(begun_and_ended)
    assert 0 < made < STEPS


@pytest.mark.usefixtures("unharmed")
def test_a_deadline_that_passes_behind_another_run_is_called_that(served: TritonServer) -> None:
    """The request is past the first model then and waits for the one that holds the engines. How soon it gets past that
    is the machine's affair: where the deadline comes before, Triton's own queue refuses, and a later one is tried.
    """
    microseconds = 1000
    with grpc(served) as client, plain(served) as other:

        def told_behind_the_run() -> bool:
            nonlocal microseconds
            with ThreadPoolExecutor(1) as pool:
                before = steps(served)
                running = pool.submit(stream, client, rows=ROWS, prompt=PROMPT)
                until(lambda: steps(served) > before)
                status, reason = "", ""
                try:
                    other.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT), timeout=microseconds)
                except InferenceServerException as error:
                    status, reason = error.status(), error.message()
                assert running.result(300)
            microseconds = microseconds * 2 if status else microseconds // 2  # without, the run was over sooner
            assert not status or (status == "503" and (WAITED in reason or "The deadline passed" in reason))
            return "The deadline passed" in reason

        until(told_behind_the_run)


def test_what_waits_too_long_or_in_too_long_a_queue_is_refused(
    sd15_bundle: Path, tmp_path: Path, triton: Callable[..., TritonServer]
) -> None:
    plan = RepositoryPlan(
        queue=Queue(size=2, seconds=0.2), options={"threads": 1}
    )  # engines are opened anew: runs take longer
    write(sd15_bundle, tmp_path / "models", plan)
    server = triton(tmp_path / "models")

    def ask(rows: int) -> Any:
        with plain(server) as client:
            return client.infer(MODEL, inputs(tritonclient.http, rows, prompt=PROMPT)).as_numpy("image")

    def told(rows: int) -> tuple[str, str]:
        """Status and message of a refusal; nothing where there is a picture."""
        try:
            assert ask(rows).shape == (rows, 1)
        except InferenceServerException as error:
            return error.status(), error.message()
        return "", ""

    found: list[tuple[str, str]] = []

    def crowded() -> bool:
        """Six ask while a long run goes on; whether none came so late that it had its turn, and some at once."""
        with ThreadPoolExecutor(8) as pool:
            before = steps(server)
            running: Future[Any] = pool.submit(ask, ROWS)
            until(lambda: steps(server) > before)
            found[:] = pool.map(told, [1] * 6)
            assert running.result(300).shape == (ROWS, 1)
        refused_at_once = any(FULL in reason for _, reason in found)
        return refused_at_once and any(WAITED in reason for _, reason in found) and all(status for status, _ in found)

    until(crowded)
    assert {status for status, _ in found} == {"503"}
    assert all(FULL in reason or WAITED in reason for _, reason in found)
    until(lambda: told(1) == ("", ""))
