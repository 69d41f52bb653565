"""What the runs of a bundle leave out: as facts for pictures and pages, and in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hidiff_runtime.format.forecast_record import Forecast
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
