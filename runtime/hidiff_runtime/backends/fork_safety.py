"""Processes that fork: a child has its parent's memory, and none of the threads that were doing something with it."""

from __future__ import annotations

import os
from typing import Any, Protocol
from weakref import WeakSet

left_behind: list[Any] = []
"""What belongs to the parent, kept for good: to let go of it is to wait for threads that are not here."""


class Forking(Protocol):
    """What has to know that it is in a new process."""

    def forked(self) -> None:
        """Prepares the child, before anything else runs there."""


_known: WeakSet[Forking] = WeakSet()


def on_fork(told: Forking) -> None:
    """Has ``told.forked`` called in each process that is forked from this one, as long as somebody holds it."""
    _known.add(told)


def _tell() -> None:
    for told in tuple(_known):
        told.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_tell)
