"""A thread beside the runs of a model: what waits for Triton's server happens there, while the next step is evaluated.

Each call of Triton's Python backend wakes the server's process and waits for it, a tenth of a millisecond that a run
would otherwise spend several times a step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

PAUSE = 0.02
"""Seconds between two looks whether a client has gone."""

Work = Callable[[], object]


class BackgroundThread:
    """Does one thing after another.

    Args:
        failed: told of what a piece of work raised.
    """

    def __init__(self, failed: Callable[[Exception], object]) -> None:
        self._failed = failed
        self._todo: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._looks: tuple[Work, ...] = ()
        self._thread = threading.Thread(target=self._run, name="hidiff-aside", daemon=True)
        self._thread.start()

    def do(self, work: Work) -> None:
        """Puts ``work`` behind what is to be done; returns at once."""
        self._todo.put(work)

    def deferred(self, work: Callable[..., object]) -> Callable[..., None]:
        """Returns what has the thread call ``work`` with the same arguments."""
        return lambda *arguments: self.do(partial(work, *arguments))

    def flush(self) -> None:
        """Waits until everything so far is done."""
        done = threading.Event()
        self.do(done.set)
        done.wait()

    @contextmanager
    def watching(self, gone: Callable[[], bool]) -> Iterator[threading.Event]:
        """Yields an event that is set once ``gone`` says so or raises, which is asked again and again.

        Several clients can be watched at once.
        """
        event = threading.Event()

        def look() -> None:
            try:
                if gone():
                    event.set()
            except Exception:
                event.set()
                raise

        self._looks = (*self._looks, look)
        self.do(look)
        try:
            yield event
        finally:
            self._looks = tuple(other for other in self._looks if other is not look)
            self.flush()  # after which nothing of the run is touched any more

    def close(self) -> None:
        """Does what is left, and ends."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            try:
                work = self._todo.get(timeout=PAUSE if self._looks else None)
            except queue.Empty:
                pass
            else:
                if work is None:
                    return
                self._try(work)
            looks = self._looks
            if looks and time.monotonic() - looked >= PAUSE:
                looked = time.monotonic()
                for look in looks:
                    self._try(look)

    def _try(self, work: Work) -> None:
        try:
            work()
        except Exception as error:
            self._failed(error)
