"""A model's process killed in mid-request, and models that are loaded anew, on the real server."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from hidiff_runtime.serving import heartbeat
from tests.deploy.clients import MODEL, STREAM, grpc, http, inputs, picture
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"
ROWS = 8
"""Of a request that takes a while."""

SECONDS = 120.0
"""In which a client must learn of it; it takes 0.1 to 3 on an idle machine."""


def steps(server: TritonServer) -> float:
    """Steps that were made so far."""
    return sum(server.measured("hidiff_step_seconds_count").values())


def kill_in_mid_run(server: TritonServer, model: str, before: float) -> None:
    """Kills the process of ``model`` once a step was made since ``before``."""
    deadline = time.monotonic() + SECONDS
    while steps(server) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in server.stubs(model):
        os.kill(process, signal.SIGKILL)


def refusal(server: TritonServer, model: str) -> str:
    """What a client is told; Triton itself answers for a model whose process is gone, after a second."""
    if model == MODEL:
        with http(server) as client, pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT))
        return str(caught.value.message())
    told: queue.Queue[Any] = queue.Queue()
    with grpc(server) as client:
        client.start_stream(lambda result, error: told.put((result, error)))
        client.async_stream_infer(STREAM, inputs(tritonclient.grpc, prompt=PROMPT))
        result, error = told.get(timeout=SECONDS)
        client.stop_stream()
    assert result is None
    return str(error.message())


def beats(server: TritonServer) -> dict[str, float]:
    """The heartbeats by model."""
    found = server.measured("hidiff_heartbeat_seconds")
    return {model: next(at for name, at in found.items() if f'model="{model}"' in name) for model in (MODEL, STREAM)}


def stopped(server: TritonServer) -> None:
    """No model's heart beats any more, and Triton itself says that it is ready: a probe is needed."""
    before, deadline = beats(server), time.monotonic() + SECONDS
    while True:
        time.sleep(heartbeat.SECONDS + 2)
        found = beats(server)
        if found == before:
            break
        assert time.monotonic() < deadline, found
        before = found
    assert server.process.poll() is None
    assert server.ready()


@pytest.mark.parametrize("victim", [STREAM, MODEL])
def test_a_client_of_the_front_learns_soon_that_a_process_was_killed(
    repository: Path, triton: Callable[..., TritonServer], victim: str
) -> None:
    server = triton(repository, options=["--exit-timeout-secs=1"])
    before = steps(server)
    with http(server) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.infer, MODEL, inputs(tritonclient.http, ROWS, prompt=PROMPT))
        kill_in_mid_run(server, victim, before)
        error = call.exception(SECONDS)
    assert isinstance(error, InferenceServerException)
    wanted = "The process that holds the engines has ended." if victim == STREAM else "not healthy"
    assert wanted in error.message()
    assert "cannot take" in refusal(server, MODEL) if victim == STREAM else "not healthy" in refusal(server, MODEL)
    if victim == MODEL:  # test_liveness.py kills the other; this one is stuck in sending what nobody takes
        stopped(server)


def test_a_client_of_the_stream_learns_soon_that_its_process_was_killed(
    repository: Path, triton: Callable[..., TritonServer]
) -> None:
    server = triton(repository, options=["--exit-timeout-secs=1"])
    before, told = steps(server), queue.Queue[Any]()
    with grpc(server) as client:
        client.start_stream(lambda result, error: told.put((result, error)))
        client.async_stream_infer(STREAM, inputs(tritonclient.grpc, ROWS, prompt=PROMPT))
        kill_in_mid_run(server, STREAM, before)
        error = None
        while error is None:
            _, error = told.get(timeout=SECONDS)
        client.stop_stream()
    if "Socket closed" in error.message():  # seen once, on a busy machine: Triton itself ended with the process
        server.wait_end()
        return
    assert "not healthy" in error.message()
    assert "not healthy" in refusal(server, STREAM)


def test_the_stream_outlives_a_front_that_is_killed_while_it_waits(
    repository: Path, triton: Callable[..., TritonServer]
) -> None:
    server = triton(repository, options=["--exit-timeout-secs=1"])
    for process in server.stubs(MODEL):
        os.kill(process, signal.SIGKILL)
    assert "not healthy" in refusal(server, MODEL)
    told: queue.Queue[Any] = queue.Queue()
    with grpc(server) as client:
        client.start_stream(lambda result, error: told.put((result, error)))
        client.async_stream_infer(STREAM, inputs(tritonclient.grpc, prompt=PROMPT))
        messages = [told.get(timeout=SECONDS)[0] for _ in range(4)]
        client.stop_stream()
    assert picture(messages[-1].as_numpy("image")[0, 0]).size == (128, 128)
