"""How far a build of TensorRT is, from the nested phases that it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock


@dataclass
class _Phase:
    name: str
    steps: int
    done: int = 0


class NestedProgress:
    """Phases within phases, each of a number of steps, as one fraction that only grows.

    Called from the library's threads.

    Args:
        show: called with the fraction and the name of the innermost phase, when it has moved enough to see.
    """

    _LEAST = 0.005

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show = show
        self._lock = Lock()
        self._open: list[_Phase] = []
        self._shown = (0.0, "")

    def start(self, name: str, steps: int) -> None:
        """Begins a phase within those that are open."""
        with self._lock:
            self._open.append(_Phase(name, steps))
            self._report()

    def step(self, name: str, step: int) -> None:
        """Counts step ``step`` of an open phase, from 0, as done."""
        with self._lock:
            for phase in self._open:
                if phase.name == name:
                    phase.done = step + 1
            self._report()

    def finish(self, name: str) -> None:
        """Ends a phase."""
        with self._lock:
            self._open = [phase for phase in self._open if phase.name != name]

    def _report(self) -> None:
        fraction = 0.0
        for phase in reversed(self._open):
            fraction = min(phase.done + fraction, phase.steps) / phase.steps
        fraction = max(fraction, self._shown[0])
        note = self._open[-1].name if self._open else self._shown[1]
        if fraction - self._shown[0] >= self._LEAST or note != self._shown[1]:
            self._shown = (fraction, note)
            self._show(fraction, note)
