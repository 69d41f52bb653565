"""A log that does not grow without end: what repeats is counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

KINDS = 200
"""Different messages that are told apart; clients must not fill the log with ones that differ a little."""


@dataclass
class _Repeated:
    record: logging.LogRecord
    until: float
    count: int = 0


class RepeatCounter(logging.Filter):
    """Lets a message through once in a while, and says with the next one how many there were between.

    Messages are the same whose first lines are, with the place of the error that they tell of.

    Args:
        seconds: between two that are the same.
        clock: tells the time.
    """

    def __init__(self, seconds: float = 60, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[object, _Repeated] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to tell it; adds the count of those that were not told."""
        with self._lock:
            now, kind = self._clock(), _kind(record)
            if kind not in self._seen and len(self._seen) >= KINDS:
                self._seen = {key: seen for key, seen in self._seen.items() if seen.count or now < seen.until}
                kind = kind if len(self._seen) < KINDS else None
            seen = self._seen.get(kind)
            if seen is not None and now < seen.until:
                seen.count += 1
                return False
            self._seen[kind] = _Repeated(record, now + self._seconds)
        if seen is not None and seen.count:
            record.msg, record.args = f"{record.getMessage()} ({seen.count} more since the last time)", None
        return True

    def rest(self) -> list[str]:
        """Returns what has been counted and not told, a line each; forgets it."""
        with self._lock:
            left = [seen for seen in self._seen.values() if seen.count]
            self._seen.clear()
        return [f"{seen.count} more: {_first_line(seen.record)}" for seen in left]


def _kind(record: logging.LogRecord) -> object:
    error = record.exc_info[1] if record.exc_info else None
    place = error.__traceback__ if error is not None else None
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = (place.tb_frame.f_code.co_filename, place.tb_lineno) if place is not None else None
    return record.name, _first_line(record), type(error), where


def _first_line(record: logging.LogRecord) -> str:
    return record.getMessage().split("\n", 1)[0]
