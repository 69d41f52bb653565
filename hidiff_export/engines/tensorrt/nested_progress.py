"""How far a build of TensorRT is, from the nested phases that it reports."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock


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
        self._open: dict[str, tuple[int, int]] = {}  # by name, outermost first: steps done, of how many
        self._shown = (0.0, "")

    def start(self, name: str, steps: int) -> None:
        """Begins a phase within those that are open."""
        with self._lock:
            self._open[name] = (0, steps)
            self._report()

    def step(self, name: str, step: int) -> None:
        """Counts step ``step`` of an open phase, from 0, as done."""
        with self._lock:
            if name in self._open:
                self._open[name] = (step + 1, self._open[name][1])
            self._report()

    def finish(self, name: str) -> None:
        """Ends a phase."""
        with self._lock:
            self._open.pop(name, None)

    def _report(self) -> None:
        fraction = 0.0
        for done, steps in reversed(self._open.values()):
            fraction = min(done + fraction, steps) / steps
        fraction = max(fraction, self._shown[0])
        note = next(reversed(self._open), self._shown[1])
        if fraction - self._shown[0] >= self._LEAST or note != self._shown[1]:
            self._shown = (fraction, note)
            self._show(fraction, note)
