"""Which engines are open: those of the phase whose turn it is, and the others closed first unless all may stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from hidiff_runtime.backends.protocol import Session
from hidiff_runtime.errors import InputError
from hidiff_runtime.phases import Phase

RESIDENT = ("current", "all")

ControlNetKey = Literal["controlnet"]
CONTROLNET: ControlNetKey = "controlnet"
"""What the ControlNet's engine is asked for by, as a phase's is by its phase."""


class EnginePool:
    """The sessions of a bundle's phases, and of its ControlNet.

    Args:
        open_session: opens an engine; entered here, and left when it is closed.
        resident: ``current`` keeps at most one phase's engine open, and the ControlNet's beside it from when it is
            asked for until a phase without residuals is; ``all`` keeps every engine it has opened.

    Raises:
        InputError: ``resident`` is neither.
    """

    def __init__(self, open_session: Callable[[Phase | ControlNetKey], Session], resident: str = "current") -> None:
        if resident not in RESIDENT:
            raise InputError(
                "resident must be 'current' or 'all'.", given=repr(resident), advice="'current' needs the least memory."
            )
        self._open_session = open_session
        self._resident = resident
        self._sessions: dict[Phase | ControlNetKey, Session] = {}

    @property
    def open_phases(self) -> tuple[Phase, ...]:
        """The phases whose engines are open."""
        return tuple(key for key in self._sessions if isinstance(key, Phase))

    def get(self, phase: Phase) -> Session:
        """The phase's session, opened if need be.

        Raises:
            EngineError: the engine does not load; the next `get` tries again.
        """
        if self._resident == "current":
            for key in tuple(self._sessions):
                if key != phase and not (key == CONTROLNET and phase.control):
                    self._close(key)
        return self._get(phase)

    def controlnet(self) -> Session:
        """The ControlNet's session, opened if need be beside the phase's. Raises as `get` does."""
        return self._get(CONTROLNET)

    def preload(self, phases: Sequence[Phase], *, controlnet: bool) -> None:
        """Opens the first phase's engine, or every phase's where all may stay; the ControlNet's where they need it.

        Args:
            phases: in running order.
            controlnet: whether the bundle has one.
        """
        wanted = phases if self._resident == "all" else phases[:1]
        for phase in wanted:
            self.get(phase)
        if controlnet and any(phase.control for phase in wanted):
            self.controlnet()

    def close(self) -> None:
        """Closes every engine; the next `get` opens its own again."""
        for key in tuple(self._sessions):
            self._close(key)

    def _get(self, key: Phase | ControlNetKey) -> Session:
        if key not in self._sessions:
            session = self._open_session(key)
            session.__enter__()
            self._sessions[key] = session
        return self._sessions[key]

    def _close(self, key: Phase | ControlNetKey) -> None:
        self._sessions.pop(key).__exit__(None, None, None)
