"""The log: what repeats is counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from hidiff_runtime.serving.http.log_throttle import KINDS, RepeatCounter


class Kept(logging.Handler):
    """Keeps what it is given; its clock is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.lines: list[str] = []
        self.repeats = RepeatCounter(seconds=60, clock=lambda: self.now)
        self.addFilter(self.repeats)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, log = Kept(), logging.getLogger("test.repeats")
    log.addHandler(handler)
    log.propagate = False
    yield handler
    log.removeHandler(handler)


log = logging.getLogger("test.repeats")


def test_what_repeats_is_told_once_a_minute_with_a_count(kept: Kept) -> None:
    for _ in range(1000):
        log.warning("No place for %d.", 3)
    assert kept.lines == ["No place for 3."]
    kept.now = 61
    log.warning("No place for %d.", 3)
    assert kept.lines[1:] == ["No place for 3. (999 more since the last time)"]
    kept.now = 122
    log.warning("No place for %d.", 3)
    assert kept.lines[2:] == ["No place for 3."]


def test_what_differs_is_told(kept: Kept) -> None:
    for number in range(3):
        log.warning("Engine %d failed.", number)
    assert kept.lines == ["Engine 0 failed.", "Engine 1 failed.", "Engine 2 failed."]


def test_errors_of_two_places_differ(kept: Kept) -> None:
    for fault in (lambda: int("a"), lambda: [][1]):
        for _ in range(2):
            try:
                fault()
            except Exception:
                log.exception("A request failed.")
    assert len(kept.lines) == 2


def test_messages_that_differ_a_little_do_not_fill_the_log(kept: Kept) -> None:
    for number in range(10 * KINDS):
        log.warning("Client %d.", number)
    assert len(kept.lines) == KINDS + 1
    kept.now = 61
    log.warning("Client again.")
    assert kept.lines[-1] == "Client again."


def test_what_was_not_told_is_told_in_the_end(kept: Kept) -> None:
    for _ in range(5):
        log.warning("No place.")
    assert kept.repeats.rest() == ["4 more: No place."]
    assert kept.repeats.rest() == []
