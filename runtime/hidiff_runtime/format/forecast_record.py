"""Which evaluations a bundle computes where it forecasts the others, as `hidiff_runtime.sampling.forecast` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hidiff_runtime.format.record_codec import Float, whole

_NEW_NOISE = "each of its steps guesses the whole picture and adds new noise to it, so that its outputs follow no curve"
UNSUITABLE = {"lcm": _NEW_NOISE, "tcd": _NEW_NOISE}
"""Samplers whose outputs cannot be forecast, and why. On the demo model a forecast picture of theirs is as far from the
full run's as one of another seed (12 and 14 dB), where the others' are 23 to 32 dB from it."""


@dataclass(frozen=True)
class Forecast:
    """Which evaluations of a run are computed: the first ones, then one of a growing number of them, then the last.

    Phases do not matter: on the demo model to begin anew at each takes more evaluations and gives no closer picture.

    Args:
        warm_up: so many at the start, at least 2.
        window: after them one of so many, rounded down; at least 1.
        growth: by which the window grows each time.
        last: part of the run at its end that is computed whole, 0 to 1.
    """

    warm_up: Annotated[int, whole(2)] = 4
    window: Float = 2.0
    growth: Float = 0.5
    last: Float = 0.1

    @property
    def fault(self) -> str:
        """Says which bound the settings exceed; empty where they can be followed."""
        if self.warm_up >= 2 and self.window >= 1 and self.growth >= 0 and 0 <= self.last <= 1:
            return ""
        return "must have a warm-up of 2 or more, a window of 1 or more, growth of 0 or more and a last part of 0 to 1"

    def __str__(self) -> str:
        """Returns the settings in words."""
        growing = f" growing by {self.growth:g}" if self.growth else ""
        return f"the first {self.warm_up}, one of {self.window:g}{growing}, and the last {self.last:.0%}"

    def computed(self, evaluations: int) -> tuple[bool, ...]:
        """Returns which of a run's evaluations are computed."""
        window, left_out = self.window, 0
        found = []
        for index in range(evaluations):
            due = left_out + 1 >= int(window)
            whole = index < self.warm_up or index >= int(evaluations * (1 - self.last))
            if due and not whole:
                window += self.growth
            found.append(due or whole)
            left_out = 0 if due or whole else left_out + 1
        return tuple(found)


def computed_of(forecast: Forecast | None, evaluations: int) -> tuple[bool, ...]:
    """Returns which of a run's evaluations are computed: all, where nothing is forecast."""
    return (True,) * evaluations if forecast is None else forecast.computed(evaluations)
