"""Requests that wait are drawn together where the repository says so, and each gets its own picture all the same."""

from __future__ import annotations

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
from PIL import Image
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
ROWS = 8
"""Of the request that keeps the engines busy while others come to wait: two runs of the largest batch."""

Way = Callable[[TritonServer, int], np.ndarray]
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


def streamed(server: TritonServer, seed: int) -> np.ndarray:
    """A picture of the model that tells of each step, which it must have done."""
    with grpc(server) as client:
        *steps, last = stream(client, prompt=PROMPT, seed=seed)
    assert [int(one["step"][0, 0]) for one in steps] == [1, 2, 3]
    assert json.loads(last["parameters"][0, 0])["seed"] == seed
    return np.asarray(picture(last["image"][0, 0]))


def busy(server: TritonServer, pool: ThreadPoolExecutor) -> Future[Any]:
    """A long request, which has begun."""

    def ask() -> Any:
        with grpc(server) as client:
            return client.infer(MODEL, inputs(tritonclient.grpc, ROWS, prompt=PROMPT, seed=list(range(ROWS))))

    before = evaluations(server)
    asked = pool.submit(ask)
    until(lambda: evaluations(server) > before)
    return asked


def crowd(server: TritonServer, seeds: Sequence[int], way: Way) -> tuple[list[np.ndarray], float]:
    """What so many clients get that ask at once behind a long request, and how many steps were evaluated for them."""
    before = evaluations(server)
    with ThreadPoolExecutor(len(seeds) + 1) as pool:
        first = busy(server, pool)
        found = list(pool.map(lambda seed: way(server, seed), seeds))
        assert first.result().as_numpy("image").shape == (ROWS, 1)
    return found, evaluations(server) - before - STEPS * ROWS / BATCH


@pytest.mark.parametrize("way", [front, streamed])
def test_each_client_gets_the_picture_of_its_seed_from_fewer_runs(
    server: TritonServer, alone: Draw, way: Way
) -> None:
    seeds = range(10, 18)
    expected = [alone(seed) for seed in seeds]
    assert not any(same(one, other) for one, other in zip(expected, expected[1:], strict=False))
    pictures = count(server, "hidiff_pictures_total")
    evaluated = []

    def joined() -> bool:
        """Some came so late, perhaps, that they were alone; not all each time."""
        found, steps = crowd(server, seeds, way)
        assert all(same(one, other) for one, other in zip(found, expected, strict=True))
        evaluated.append(steps)
        return steps <= STEPS * (len(seeds) - BATCH + 1)

    until(joined)
    assert count(server, "hidiff_pictures_total") - pictures == len(evaluated) * (ROWS + len(seeds))


@pytest.mark.parametrize("way", [front, streamed])
def test_without_the_option_each_is_a_run_of_its_own(
    batches: Path, tmp_path: Path, triton: Callable[..., TritonServer], alone: Draw, way: Way
) -> None:
    server, seeds = triton(repository(batches, tmp_path)), range(8)
    found, steps = crowd(server, seeds, way)
    assert steps == STEPS * len(seeds)
    assert all(same(one, alone(seed)) for one, seed in zip(found, seeds, strict=True))
