"""How a job is shown while it goes on: done, failed, pictures a minute, time left, workers."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from hidiff_runtime.console.printing import progress
from hidiff_runtime.console.progress import clock

WINDOW = 50
"""Rows that the speed is taken from."""


class JobProgress:
    """Shows a line now and then, from a thread of its own. A context manager.

    Args:
        total: rows of the job.
        done: that were finished before.
        failed: that had failed before.
        batch: pictures of a row.
        actors: workers that are wanted.
        alive: asks how many there are.
    """

    def __init__(self, total: int, done: int, failed: int, batch: int, actors: int, alive: Callable[[], int]) -> None:
        self.total = total
        self.done = done
        self.failed = failed
        self._batch = batch
        self._actors = actors
        self._alive = alive
        self._ends: deque[float] = deque([time.monotonic()], WINDOW)
        self._first = True
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._show, name="hidiff-progress", daemon=True)

    def count(self, *, failed: bool) -> None:
        """Counts a row that came back."""
        if self._first:  # opening the bundle is not the workers' speed
            self._ends.clear()
            self._first = False
        self._ends.append(time.monotonic())
        if failed:
            self.failed += 1
        else:
            self.done += 1

    def line(self) -> str:
        """Returns where the job stands."""
        told = [f"{self.done}/{self.total} rows done, {self.failed} failed"]
        ends = list(self._ends)
        if self._first:
            told.append("workers open the bundle")
        elif len(ends) > 1 and ends[-1] > ends[0]:
            speed = (len(ends) - 1) / (ends[-1] - ends[0])
            left = (self.total - self.done - self.failed) / speed
            told.append(f"{speed * 60 * self._batch:.3g} pictures/min, {clock(left)} left")
        told.append(f"{self._alive()} of {self._actors} workers alive")
        return ", ".join(told)

    def __enter__(self) -> JobProgress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _show(self) -> None:
        terminal = sys.stderr.isatty()
        while not self._stopped.wait(1 if terminal else 10):
            progress(self.line(), end="" if terminal else "\n")
        progress("", end="\n" if terminal else "")
