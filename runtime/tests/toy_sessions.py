"""Sessions that compute nothing: they note in which order they are entered and left, and by which thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import toy

from hidiff_runtime import EngineError

PATIENCE = 120


@dataclass
class Sessions:
    """Makes sessions; notes in which order they are entered and left, and by which thread.

    Args:
        hold: waited for before a session of these is entered.
        broken: what these sessions raise instead, once each.
    """

    events: list[str] = field(default_factory=list)
    threads: dict[str, str] = field(default_factory=dict)
    hold: dict[str, threading.Event] = field(default_factory=dict)
    broken: dict[str, EngineError] = field(default_factory=dict)

    def __call__(self, key: str) -> Session:
        return Session(self, key)


@dataclass
class Session:
    sessions: Sessions
    key: str

    def __enter__(self) -> Session:
        if self.key in self.sessions.hold:
            assert self.sessions.hold[self.key].wait(PATIENCE)
        if self.key in self.sessions.broken:
            raise self.sessions.broken.pop(self.key)
        self.sessions.threads[self.key] = threading.current_thread().name
        self.sessions.events.append(f"open {self.key}")
        return self

    def __exit__(self, *_: object) -> None:
        self.sessions.events.append(f"close {self.key}")

    def run(self, _inputs: toy.Arrays) -> dict[str, object]:
        raise NotImplementedError

    def execute(self, _inputs: object, _outputs: object) -> None:
        raise NotImplementedError


def until(events: list[str], event: str, first: int = 0) -> None:
    """Waits for what a thread does, after the first so many events."""
    end = time.monotonic() + PATIENCE
    while event not in events[first:]:
        assert time.monotonic() < end, f"{event} did not come: {events}"
        time.sleep(0.01)
