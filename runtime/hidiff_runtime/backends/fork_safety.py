"""Processes that fork: a child has its parent's memory, and none of the threads that were doing something with it."""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakSet

left_behind: list[Any] = []
"""What belongs to the parent, kept for good: to let go of it is to wait for threads that are not here."""


_owners: WeakSet[Any] = WeakSet()


def on_fork(owner: Any) -> None:
    """Has ``owner.forked()`` called first in each process forked from this one, as long as somebody holds the owner."""
    _owners.add(owner)


def _tell() -> None:
    for owner in tuple(_owners):
        owner.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_tell)
