"""What combinations of what a bundle leaves out are worth."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from hidiff_export.benchmarking.bench_tables import markdown, savings_rows
from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.savings import combinations
from hidiff_export.benchmarking.timings import ContenderTimes, PhaseTimes, SizeTimes
from hidiff_export.benchmarking.workload import Workload
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import PhaseRule, StepRange
from hidiff_runtime.reused_features import Reuse

CHANGES = ("guidance_until=0.6", "reuse=3", "forecast=true")
SECONDS = {"strided": 4.0, "windowed": 7.0}
"""Of a guided evaluation in full; half of it without guidance, a tenth shallow."""


def measured(recipe: Recipe, *, bundle: bool = True) -> SizeTimes:
    work = Workload(recipe, 50)
    one = Competitor("one", "bundle", "", "float32", True, {}, sys.executable, bundle, recipe.forecast_record)
    times = ContenderTimes(one)
    for planned in work.phases_of(bundle=bundle):
        phase = planned.phase
        took = SECONDS[phase.kind.value] * (0.5 if phase.unguided else 1) * (0.1 if phase.shallow else 1)
        times.phases[phase.name] = PhaseTimes(wall=[took], processor=[took])
    return SizeTimes(work, (times,), "one")


def test_each_way_counts_by_itself_and_all_together() -> None:
    size = measured(Recipe.load("sd15-1024", CHANGES))
    saved = {run.name: run for run in size.savings(size.contenders[0])}
    full = 20 * 4.0 + 30 * 7.0
    assert saved["full run"].seconds == pytest.approx(full)
    assert saved["guided in part"].seconds == pytest.approx(full - 20 * 3.5)
    # Full ones at 0, 3, …, 18 and 20, 23, …, 47: 7 strided, 10 windowed.
    assert saved["reused features"].seconds == pytest.approx(7 * 4 + 13 * 0.4 + 10 * 7 + 20 * 0.7)
    assert saved["forecast"].evaluations == sum(Forecast().computed(50)) == 19
    assert len(saved) == 8
    last = saved["forecast + guided in part + reused features"]
    assert last.seconds == size.run_seconds(size.contenders[0]) == min(run.seconds for run in saved.values())
    assert last.flops == size.run_flops(size.contenders[0])
    rows = savings_rows(size, size.contenders[0])
    assert rows[0][-1] == "1.00x"
    assert "What one leaves out" in markdown(_MACHINE, {"rounds": 1, "steps": 50}, [size], {}, [])


_MACHINE = {
    **dict.fromkeys(("processor", "system", "python"), "one"),
    **dict.fromkeys(("cores", "threads", "memory"), 1),
    "instructions": [],
    "versions": {},
}


def test_a_peer_leaves_nothing_out() -> None:
    size = measured(Recipe.load("sd15-1024", CHANGES), bundle=False)
    peer = size.contenders[0]
    assert list(peer.phases) == ["strided", "windowed"]
    peer = replace(peer, competitor=replace(peer.competitor, forecast=None))
    assert size.counts(peer) == {"strided": 20, "windowed": 30}
    assert size.savings(peer) == []


def test_a_bundle_that_leaves_nothing_out_has_no_table() -> None:
    size = measured(Recipe.load("sd15-1024"))
    assert size.savings(size.contenders[0]) == []
    assert "leaves out" not in markdown(_MACHINE, {"rounds": 1, "steps": 50}, [size], {}, [])


def test_combinations_that_need_graphs_that_are_not_there_are_left_out() -> None:
    """Where guidance ends before the last change of phase, no guided graph of that phase takes features."""
    rule = PhaseRule(pooled=StepRange(0, 0.9), guidance=StepRange(0.1, 0.3), reuse=Reuse(3))
    names = [one.name for one in combinations(rule, None)]
    assert names == ["full run", "guided in part", "guided in part + reused features"]
    late = replace(rule, guidance=StepRange(0, 0.95))
    assert "reused features" in [one.name for one in combinations(late, None)]
