"""A process that is forked in the middle of a run: the child can close, and run, what the parent still runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

from hidiff_runtime import Bundle
from hidiff_runtime import open as open_bundle

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # of Python 3.12 and later, where threads run
]

PATIENCE = 120


@pytest.fixture
def backend() -> toy.ToyBackend:
    return toy.ToyBackend()


@pytest.fixture
def bundle(tmp_path: Path, backend: toy.ToyBackend) -> Iterator[Bundle]:
    folder = toy.make(tmp_path / "toy", toy.Toy(reference=False))
    with open_bundle(folder, backend=backend, resident="all") as opened:
        yield opened


def run(bundle: Bundle, callback: Callable[[Any], object] | None = None) -> np.ndarray:
    given = toy.Toy().given()
    return bundle.denoiser().denoise(**given, steps=4, seed=1, guidance_scale=3.0, callback=callback)


def forked(work: Callable[[], bool]) -> bool:
    """What ``work`` says in a child; False where it raises or does not end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(PATIENCE)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_a_child_closes_and_runs_what_its_parent_is_running(bundle: Bundle, backend: toy.ToyBackend) -> None:
    expected = run(bundle)
    reached, go_on = threading.Event(), threading.Event()
    found: list[np.ndarray] = []

    def hold(_: object) -> None:
        reached.set()
        assert go_on.wait(PATIENCE)

    thread = threading.Thread(target=lambda: found.append(run(bundle, hold)))
    thread.start()
    assert reached.wait(PATIENCE)

    def close_and_run() -> bool:
        events = len(backend.events)
        bundle.close()
        closed = backend.events[events:]
        same = np.array_equal(run(bundle), expected)
        bundle.close()
        return same and not any("close" in str(event) for event in closed)  # the parent's engines are the parent's

    try:
        assert forked(lambda: bundle.lock.acquire(timeout=PATIENCE))
        assert forked(close_and_run)
    finally:
        go_on.set()
        thread.join()
    assert np.array_equal(found[0], expected)
    assert np.array_equal(run(bundle), expected)


def test_a_child_of_a_parent_that_runs_nothing_goes_on_with_its_engines(
    bundle: Bundle, backend: toy.ToyBackend
) -> None:
    expected = run(bundle)

    def again() -> bool:
        events = len(backend.events)
        return np.array_equal(run(bundle), expected) and not any(
            "open" in str(event) for event in backend.events[events:]
        )

    assert forked(again)


def test_a_callback_that_forks_is_in_its_own_run(bundle: Bundle) -> None:
    told: list[bool] = []
    run(bundle, lambda _: told.append(forked(lambda: bundle.lock.acquire(blocking=False))))
    assert told == [True] * 4


def test_the_control_of_what_a_child_says() -> None:
    assert forked(lambda: True)
    assert not forked(lambda: False)
    assert not forked(lambda: bool([][0]))
