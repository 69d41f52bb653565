"""Requests that wait are drawn together where the repository says so, and each gets its own picture all the same."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from hidiff_export.compiler.buckets import add_bucket
from hidiff_export.triton.repository import RepositoryPlan, write
from hidiff_runtime import Pipeline
from tests.conftest import NoDisplay
from tests.deploy.clients import MODEL, STREAM, grpc, http, inputs, picture, stream
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

PROMPT = "a lighthouse at dusk"
STEPS, BATCH = 3, 4
ROWS, LONG = 8, 2
"""Of each request that keeps the engines busy while others come to wait, and how many of these there are."""

BUSY = STEPS * LONG * ROWS // BATCH
"""Steps that are evaluated for these."""

Way = Callable[[TritonServer, int], Any]
Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def batches(sd15_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with a batch of four."""
    folder = tmp_path_factory.mktemp("batches") / "bundle"
    shutil.copytree(sd15_bundle, folder)
    add_bucket(folder, (128, 128), BATCH, NoDisplay())
    return folder


def repository(bundle: Path, folder: Path, **plan: Any) -> Path:
    """A repository of the bundle in ``folder``."""
    write(bundle, folder / "models", RepositoryPlan(options={"resident": "all", "threads": 1}, **plan))
    return folder / "models"


@pytest.fixture(scope="module")
def server(batches: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Draws those that wait together."""
    folder = tmp_path_factory.mktemp("joined")
    with TritonServer(repository(batches, folder, dynamic_batching=True), folder) as started:
        yield started


@pytest.fixture(scope="module")
def alone(batches: Path) -> Iterator[Draw]:
    """Draws a picture by itself."""
    with Pipeline.open(batches, resident="all", threads=1) as pipe:
        yield lambda seed, **given: np.asarray(pipe(PROMPT, seed=seed, **given))


def count(server: TritonServer, what: str, label: str = "") -> float:
    """The sum of a counter."""
    return sum(value for name, value in server.measured(what).items() if label in name)


def evaluations(server: TritonServer) -> float:
    """Steps of all runs so far, whatever their batch."""
    return count(server, "hidiff_step_seconds_count")


def until(true: Callable[[], bool]) -> None:
    """Waits for something that must come to be."""
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two pictures are one, but for rounding."""
    return found.shape == expected.shape and int(np.abs(found.astype(int) - expected.astype(int)).max()) <= 1


def front(server: TritonServer, seed: int, **given: Any) -> np.ndarray:
    """A picture of the model that answers once."""
    with http(server) as client:
        answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, seed=seed, **given))
    assert json.loads(answer.as_numpy("parameters")[0, 0])["seed"] == seed
    return np.asarray(picture(answer.as_numpy("image")[0, 0]))


def streamed(server: TritonServer, seed: int, **given: Any) -> np.ndarray:
    """A picture of the model that tells of each step, which it must have done."""
    with grpc(server) as client:
        *steps, last = stream(client, prompt=PROMPT, seed=seed, **given)
    assert [int(one["step"][0, 0]) for one in steps] == [1, 2, 3]
    assert json.loads(last["parameters"][0, 0])["seed"] == seed
    return np.asarray(picture(last["image"][0, 0]))


def busy(server: TritonServer, pool: ThreadPoolExecutor) -> Sequence[Future[Any]]:
    """Long requests, which have begun."""

    def ask() -> Any:
        with grpc(server) as client:
            return client.infer(MODEL, inputs(tritonclient.grpc, ROWS, prompt=PROMPT, seed=list(range(ROWS))))

    before = evaluations(server)
    asked = [pool.submit(ask) for _ in range(LONG)]
    until(lambda: evaluations(server) > before)
    return asked


def waits(server: TritonServer, long: Sequence[Future[Any]]) -> bool:
    """Whether a request waits behind the long ones, or came too late."""
    return count(server, "nv_inference_pending_request_count") >= LONG or all(one.done() for one in long)


def crowd(server: TritonServer, seeds: Sequence[int], way: Way) -> tuple[list[Any], float]:
    """What so many clients get that ask at once behind long requests, and how many steps were evaluated for them."""
    before = evaluations(server)
    with ThreadPoolExecutor(len(seeds) + LONG) as pool:
        long = busy(server, pool)
        found = list(pool.map(lambda seed: way(server, seed), seeds))
        assert all(one.result().as_numpy("image").shape == (ROWS, 1) for one in long)
    return found, evaluations(server) - before - BUSY


@pytest.mark.parametrize("way", [front, streamed])
def test_each_client_gets_the_picture_of_its_seed_from_fewer_runs(server: TritonServer, alone: Draw, way: Way) -> None:
    seeds = range(10, 18)
    expected = [alone(seed) for seed in seeds]
    assert not any(same(one, other) for one, other in itertools.pairwise(expected))
    pictures = count(server, "hidiff_pictures_total")
    evaluated = []

    def joined() -> bool:
        """Some came so late, perhaps, that they were alone; not all each time."""
        found, steps = crowd(server, seeds, way)
        assert all(same(one, other) for one, other in zip(found, expected, strict=True))
        evaluated.append(steps)
        return steps <= STEPS * (len(seeds) - BATCH + 1)

    until(joined)
    assert count(server, "hidiff_pictures_total") - pictures == len(evaluated) * (LONG * ROWS + len(seeds))


@pytest.mark.parametrize("way", [front, streamed])
def test_without_the_option_each_is_a_run_of_its_own(
    batches: Path, tmp_path: Path, triton: Callable[..., TritonServer], alone: Draw, way: Way
) -> None:
    server, seeds = triton(repository(batches, tmp_path)), range(8)
    found, steps = crowd(server, seeds, way)
    assert steps == STEPS * len(seeds)
    assert all(same(one, alone(seed)) for one, seed in zip(found, seeds, strict=True))


def test_those_that_are_unlike_are_drawn_apart(server: TritonServer, alone: Draw) -> None:
    """Both kinds wait in turns, and a request of two rows among them, which is drawn by itself."""
    scales = [7.5 if seed % 2 else 3.0 for seed in range(10)]
    expected = [alone(seed, guidance_scale=scale) for seed, scale in enumerate(scales)]

    def ask(server: TritonServer, seed: int) -> list[np.ndarray]:
        rows = 2 if seed == 4 else 1
        with http(server) as client:
            given = inputs(tritonclient.http, rows, prompt=PROMPT, seed=seed, guidance_scale=scales[seed])
            answer = client.infer(MODEL, given)
        assert answer.as_numpy("image").shape == (rows, 1)
        return [np.asarray(picture(content)) for content in answer.as_numpy("image")[:, 0]]

    def joined() -> bool:
        found, steps = crowd(server, range(len(scales)), ask)
        for pictures, one in zip(found, expected, strict=True):
            assert all(same(other, one) for other in pictures)
        return steps <= STEPS * (len(scales) + 1 - BATCH + 1)

    assert not same(expected[0], alone(0, guidance_scale=7.5))
    until(joined)


def test_progress_and_previews_are_of_the_own_picture(server: TritonServer, batches: Path) -> None:
    seeds, expected = range(30, 34), {}
    with Pipeline.open(batches, resident="all", threads=1) as pipe:
        for seed in seeds:
            seen: list[np.ndarray] = []
            pipe(PROMPT, seed=seed, callback=lambda step, seen=seen: seen.append(np.asarray(step.preview())))
            expected[seed] = seen

    def watch(server: TritonServer, seed: int) -> list[np.ndarray]:
        with grpc(server) as client:
            *steps, _ = stream(client, prompt=PROMPT, seed=seed, previews=STEPS)
        return [np.asarray(picture(one["preview"][0, 0])) for one in steps]

    def joined() -> bool:
        found, steps = crowd(server, seeds, watch)
        for seed, previews in zip(seeds, found, strict=True):
            assert all(same(one, other) for one, other in zip(previews, expected[seed], strict=True))
        return steps == STEPS

    until(joined)


def asked(client: Any, model: str, **given: Any) -> tuple[Any, queue.Queue[Any]]:
    """A call over gRPC, and where its answers come."""
    told: queue.Queue[Any] = queue.Queue()

    def answer(result: Any, error: Any) -> None:
        told.put((result, error))

    if model == MODEL:
        timeout = given.pop("timeout", None)
        call = client.async_infer(MODEL, inputs(tritonclient.grpc, prompt=PROMPT, **given), answer, timeout=timeout)
        return call, told
    client.start_stream(answer)
    client.async_stream_infer(STREAM, inputs(tritonclient.grpc, prompt=PROMPT, **given))
    return None, told


def test_those_that_leave_or_are_refused_while_others_wait_harm_nobody(server: TritonServer, alone: Draw) -> None:
    seeds = range(1, 5)

    def tried() -> bool:
        before = evaluations(server), count(server, "hidiff_cancellations_total")
        with ThreadPoolExecutor(8) as pool, grpc(server) as client:
            long = busy(server, pool)
            kept = [pool.submit(front if seed % 2 else streamed, server, seed) for seed in seeds[:2]]
            leaving, left = asked(client, MODEL, seed=6)
            _, late = asked(client, MODEL, seed=7, timeout=1000)
            _, refused = asked(client, MODEL, seed=8, steps=4)
            kept += [pool.submit(front if seed % 2 else streamed, server, seed) for seed in seeds[2:]]
            until(lambda: waits(server, long))
            leaving.cancel()
            for seed, one in zip(seeds, kept, strict=True):
                assert same(one.result(), alone(seed))
            assert all(one.result() for one in long)
            assert refused.get(timeout=300)[1].status() == "StatusCode.INVALID_ARGUMENT"
            result, error = late.get(timeout=300)
            assert result is None
            assert error.status() == "StatusCode.UNAVAILABLE"
            left.get(timeout=300)
            client.infer(MODEL, inputs(tritonclient.grpc, prompt=PROMPT))  # waits for whatever still runs
        steps = evaluations(server) - before[0] - BUSY - STEPS
        cancelled = count(server, "hidiff_cancellations_total") - before[1]
        return bool(cancelled == 1 and steps < STEPS * len(seeds))

    until(tried)


def test_one_that_is_cancelled_in_mid_run_ends_alone(server: TritonServer, alone: Draw) -> None:
    seeds = range(1, 4)

    def tried() -> bool:
        before = evaluations(server), count(server, "hidiff_cancellations_total")
        with ThreadPoolExecutor(4) as pool, grpc(server) as client:
            long = busy(server, pool)
            _, told = asked(client, STREAM, seed=9)
            kept = [pool.submit(front, server, seed) for seed in seeds]
            assert told.get(timeout=300)[0].as_numpy("event")[0, 0] == b"progress"  # its run has begun
            client.stop_stream(cancel_requests=True)
            for seed, one in zip(seeds, kept, strict=True):
                assert same(one.result(), alone(seed))
            assert all(one.result() for one in long)
        steps = evaluations(server) - before[0] - BUSY
        return bool(count(server, "hidiff_cancellations_total") == before[1] + 1 and steps == STEPS)

    until(tried)


def test_one_whose_deadline_passes_in_mid_run_ends_alone(server: TritonServer, alone: Draw) -> None:
    """However fast the machine is at that moment: deadlines are tried until one comes within a run of all four."""
    seeds, microseconds = range(1, 4), 50_000

    def tried() -> bool:
        nonlocal microseconds
        before = evaluations(server), count(server, "hidiff_failures_total", 'kind="expired"')
        with ThreadPoolExecutor(4) as pool, grpc(server) as client:
            first = pool.submit(front, server, 0)
            until(lambda: evaluations(server) > before[0])
            kept = [pool.submit(front, server, seed) for seed in seeds]
            _, told = asked(client, MODEL, seed=9, timeout=microseconds)
            result, error = told.get(timeout=300)
            for seed, one in zip(range(4), [first, *kept], strict=True):
                assert same(one.result(), alone(seed))
        assert result is None or error is None
        microseconds = microseconds * 2 // 3 if error is None else microseconds * 4 // 3
        expired = count(server, "hidiff_failures_total", 'kind="expired"') == before[1] + 1
        return bool(expired and evaluations(server) - before[0] == 2 * STEPS)

    until(tried)


def test_every_client_learns_that_the_process_was_killed(
    batches: Path, tmp_path: Path, triton: Callable[..., TritonServer]
) -> None:
    server = triton(repository(batches, tmp_path, dynamic_batching=True), options=["--exit-timeout-secs=1"])
    with ThreadPoolExecutor(8) as pool:
        long = busy(server, pool)
        asked = [pool.submit(front, server, seed) for seed in range(6)]
        until(lambda: waits(server, long))
        for process in server.stubs(STREAM):
            os.kill(process, signal.SIGKILL)
        errors = [one.exception(300) for one in (*long, *asked)]
    assert all(isinstance(error, InferenceServerException) for error in errors)
