"""What each way of leaving work out of a bundle's runs is worth, by itself and together, from the same evaluations.

A bundle holds the graphs of its full runs too, so that one measurement has what every combination takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import PhaseRule


@dataclass(frozen=True)
class Saving:
    """One combination.

    Args:
        name: the ways it takes: ``full run``, ``forecast + guided in part``, …
        rule: when each phase runs.
        forecast: which evaluations are computed; None for all.
    """

    name: str
    rule: PhaseRule
    forecast: Forecast | None


def combinations(rule: PhaseRule, forecast: Forecast | None) -> tuple[Saving, ...]:
    """Returns every combination of the ways that a bundle has, from its full run to all of them; none if it has none.

    Those that need graphs which the bundle does not have are left out: guidance may end before the last change of
    phase, after which a full run reuses nothing.

    Args:
        rule: of the bundle.
        forecast: of the bundle.
    """
    ways = _ways(rule, forecast)
    chosen = (some for count in range(len(ways) + 1) for some in itertools.combinations(ways, count))
    found = (_saving(rule, forecast, some) for some in chosen) if ways else ()
    return tuple(one for one in found if {*one.rule.phases()} <= {*rule.phases()})


def rules(rule: PhaseRule) -> Iterator[PhaseRule]:
    """Yields the rules of all combinations, the full run's first."""
    yield from dict.fromkeys(one.rule for one in combinations(rule, None)) or (rule,)


def _ways(rule: PhaseRule, forecast: Forecast | None) -> tuple[str, ...]:
    held = {"forecast": forecast, "guided in part": rule.guidance, "reused features": rule.reuse}
    return tuple(name for name, value in held.items() if value is not None)


def _saving(rule: PhaseRule, forecast: Forecast | None, ways: Sequence[str]) -> Saving:
    return Saving(
        " + ".join(ways) or "full run",
        replace(
            rule,
            guidance=rule.guidance if "guided in part" in ways else None,
            reuse=rule.reuse if "reused features" in ways else None,
        ),
        forecast if "forecast" in ways else None,
    )
