"""What the runs of a bundle leave out: as facts for pictures and pages, and in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hidiff_runtime.format.forecast_record import Forecast, computed_of
from hidiff_runtime.phases import Phase, PhasePlan, PhaseRule
from hidiff_runtime.reused_features import Reuse

if TYPE_CHECKING:
    from hidiff_runtime.format.manifest_record import ManifestRecord

LEFT_OUT = ("forecast", "guided", "reuse")
"""The facts' names."""


def left_out(manifest: ManifestRecord) -> dict[str, Any]:
    """Returns what is left out as JSON values: which steps are forecast, the part of the run that is guided, and how
    features are reused; empty where every evaluation is computed, guided and of all layers.
    """
    rule = manifest.rule
    found: dict[str, Any] = {
        "forecast": None if manifest.forecast is None else vars(manifest.forecast),
        "guided": None if rule.guidance is None else [rule.guidance.start, rule.guidance.end],
        "reuse": None if rule.reuse is None else vars(rule.reuse),
    }
    return {name: value for name, value in found.items() if value is not None}


def left_out_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns what `left_out` gave in words, by the same names; other facts are passed over."""
    found = {}
    if "forecast" in facts:
        found["forecast"] = f"computes {Forecast(**facts['forecast'])} of a run's evaluations, and forecasts the others"
    if "guided" in facts:
        start, end = facts["guided"]
        found["guided"] = f"guides the steps from {start:.0%} to {end:.0%} of a run"
    if "reuse" in facts:
        found["reuse"] = f"computes {Reuse(**facts['reuse'])}"
    return found


def phases_of_steps(rule: PhaseRule, forecast: Forecast | None, steps: int) -> tuple[Phase | None, ...]:
    """Returns the phase of each step, with the layers that are computed; None where the step is forecast.

    Args:
        rule: when each change is in force.
        forecast: which evaluations are computed; None for all.
        steps: of a run whose sampler evaluates the UNet once a step.
    """
    plan, computed = PhasePlan(rule, steps), computed_of(forecast, steps)
    whole = [plan.phase_at(step) for step in range(steps)]
    shallow = (False,) * steps if rule.reuse is None else rule.reuse.shallow(whole, computed)
    found = zip(whole, shallow, computed, strict=True)
    return tuple(replace(phase, shallow=taken) if due else None for phase, taken, due in found)
