"""Which engines are open: each phase's when its turn comes, and the last one closed first unless all may stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.errors import InputError
from hidiff_runtime.phases import Phase

RESIDENT = ("current", "all")


class EnginePool:
    """The sessions of a bundle's phases.

    Args:
        open_session: opens a phase's engine; entered here, and left when it is closed.
        resident: ``current`` keeps at most one engine open, ``all`` keeps every engine it has opened.

    Raises:
        InputError: ``resident`` is neither.
    """

    def __init__(self, open_session: Callable[[Phase], Session], resident: str = "current") -> None:
        if resident not in RESIDENT:
            raise InputError(
                "resident must be 'current' or 'all'.", given=repr(resident), advice="'current' needs the least memory."
            )
        self._open_session = open_session
        self._resident = resident
        self._sessions: dict[Phase, Session] = {}
        self._stack = ExitStack()

    @property
    def open_phases(self) -> tuple[Phase, ...]:
        """The phases whose engines are open."""
        return tuple(self._sessions)

    def get(self, phase: Phase) -> Session:
        """The phase's session, opened if need be.

        Raises:
            EngineError: the engine does not load; the next `get` tries again.
        """
        if phase not in self._sessions:
            if self._resident == "current":
                self.close()
            self._sessions[phase] = self._stack.enter_context(self._open_session(phase))
        return self._sessions[phase]

    def preload(self, phases: Sequence[Phase]) -> None:
        """Opens the first phase's engine, or every phase's where all may stay."""
        for phase in phases if self._resident == "all" else phases[:1]:
            self.get(phase)

    def close(self) -> None:
        """Closes every engine; the next `get` opens its own again."""
        self._sessions.clear()
        self._stack.close()
