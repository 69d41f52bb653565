"""The thread beside a run: order, errors, looking whether a client has gone, and metrics through it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from serving_sink import Counts

from hidiff_runtime.serving.metrics import MetricsRecorder
from hidiff_runtime.serving.triton.background_thread import BackgroundThread

PATIENCE = 120


@pytest.fixture
def failures() -> list[Exception]:
    return []


@pytest.fixture
def aside(failures: list[Exception]) -> Iterator[BackgroundThread]:
    made = BackgroundThread(failures.append)
    yield made
    made.close()


def test_does_everything_in_order_in_another_thread(aside: BackgroundThread) -> None:
    done: list[tuple[int, str]] = []
    for number in range(100):
        aside.do(lambda number=number: done.append((number, threading.current_thread().name)))
    aside.flush()
    assert done == [(number, "hidiff-aside") for number in range(100)]


def test_the_caller_does_not_wait(aside: BackgroundThread) -> None:
    go_on, reached = threading.Event(), threading.Event()
    aside.do(go_on.wait)
    aside.do(reached.set)
    assert not reached.is_set()
    go_on.set()
    assert reached.wait(PATIENCE)


def test_what_fails_is_told_and_stops_nothing(aside: BackgroundThread, failures: list[Exception]) -> None:
    done: list[int] = []
    aside.do(lambda: [][0])
    aside.do(lambda: done.append(1))
    aside.flush()
    assert done == [1]
    assert [type(error) for error in failures] == [IndexError]


def test_sees_that_a_client_has_gone_without_being_asked(aside: BackgroundThread) -> None:
    left = threading.Event()
    with aside.watching(left.is_set) as gone:
        left.set()
        assert gone.wait(PATIENCE)


def test_a_client_that_stays_is_asked_again_and_again(aside: BackgroundThread) -> None:
    with aside.watching(lambda: True) as gone:
        assert gone.wait(PATIENCE)
    with asked_often(aside) as gone:  # the next run is another client's
        assert not gone.is_set()


@contextmanager
def asked_often(aside: BackgroundThread) -> Iterator[threading.Event]:
    """A run whose client stays, after several looks whether it has gone."""
    often = threading.Semaphore(0)
    with aside.watching(lambda: bool(often.release())) as gone:
        for _ in range(5):
            assert often.acquire(timeout=PATIENCE)
        yield gone


def test_looks_also_while_there_is_much_to_do(aside: BackgroundThread) -> None:
    over = threading.Event()

    def again() -> None:
        time.sleep(0.001)
        if not over.is_set():
            aside.do(again)

    aside.do(again)
    left = threading.Event()
    with aside.watching(left.is_set) as gone:
        left.set()
        assert gone.wait(PATIENCE)
        over.set()


def test_a_client_that_cannot_be_asked_counts_as_gone(aside: BackgroundThread, failures: list[Exception]) -> None:
    def broken() -> bool:
        raise BrokenPipeError

    with aside.watching(broken) as gone:
        assert gone.wait(PATIENCE)
    assert {type(error) for error in failures} == {BrokenPipeError}


def test_several_clients_are_watched_at_once(aside: BackgroundThread) -> None:
    first, second, stays = threading.Event(), threading.Event(), threading.Event()
    with aside.watching(stays.is_set) as never, aside.watching(second.is_set) as later:
        with aside.watching(first.is_set) as gone:
            first.set()
            assert gone.wait(PATIENCE)
            assert not later.is_set()
        second.set()
        assert later.wait(PATIENCE)
        assert not never.is_set()


def test_nothing_is_asked_after_the_run(aside: BackgroundThread) -> None:
    asked: list[float] = []
    with aside.watching(lambda: bool(asked.append(time.monotonic()))):
        aside.flush()
    count = len(asked)
    assert count > 0
    with asked_often(aside):  # by then the first would have been asked, if anybody still did
        pass
    assert len(asked) == count


def test_metrics_are_written_in_order(aside: BackgroundThread) -> None:
    counts = Counts()
    meter = MetricsRecorder(aside.deferred(counts))
    meter.step("strided", (64, 48), 1.5)
    meter.step("windowed", (48, 64), 0.5)
    meter.pictures(2, (48, 64))
    meter.proven("a", "b", "toy", [(64, 48), (48, 64), (64, 48)])
    aside.flush()
    steps = [({"phase": "strided", "size": "64x48"}, 1.5), ({"phase": "windowed", "size": "48x64"}, 0.5)]
    assert counts.observed == {"hidiff_step_seconds": steps}
    assert counts.counters == {("hidiff_pictures_total", (("size", "48x64"),)): 2}
    assert counts.gauges["hidiff_parity_info"][0][1] == 1
