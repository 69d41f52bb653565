"""Medians, paired ratios, whole runs and decibels, from seconds that are made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hidiff_export.benchmarking.bench_tables import remarks
from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.timings import (
    EQUAL,
    NO_NUMBERS,
    ContenderTimes,
    PhaseTimes,
    Ratio,
    SizeTimes,
    signal_to_noise,
)
from hidiff_export.benchmarking.workload import Workload
from hidiff_export.families.cost import unet_cost
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.forecast_record import Forecast

WORK = Workload(Recipe.load("sd15-1024"), 50)
FIRST, SECOND = (planned.phase.name for planned in WORK.phases)


def times(name: str, first: list[float], second: list[float], *, hidiffusion: bool = True) -> ContenderTimes:
    """Of a contender whose CPU takes twice the wall's time."""
    phases = {
        phase: PhaseTimes(1.0, 2.0, wall, [2 * seconds for seconds in wall])
        for phase, wall in ((FIRST, first), (SECOND, second))
    }
    return ContenderTimes(Competitor(name, "eager", name, "float32", hidiffusion, {}), 4.0, 5, phases)


def test_the_work_is_the_plan_s() -> None:
    recipe = WORK.recipe
    strided = WORK.phases[0]
    assert [planned.count for planned in WORK.phases] == [20, 30]
    assert [WORK.step_of(planned.phase) for planned in WORK.phases] == [0, 20]
    size = (recipe.latent_height, recipe.latent_width)
    geometry = UNetGeometry.of(recipe.unet_config(), recipe.unet_layout, strided.phase, *size)
    assert strided.flops == 2 * unet_cost(recipe.unet_config(), recipe.unet_layout, geometry).flops
    assert WORK.stock_flops > WORK.phases[1].flops > strided.flops


def test_a_run_counts_what_a_bundle_computes() -> None:
    base, one = times("base", [2.0], [4.0]), times("one", [2.0], [4.0])
    one.competitor = replace(one.competitor, forecast=Forecast())
    size = SizeTimes(WORK, (base, one), "base")
    assert size.counts(base) == {FIRST: 20, SECOND: 30}
    assert size.counts(one) == {FIRST: 9, SECOND: 10}
    assert size.run_seconds(one) == 9 * 2 + 10 * 4
    ratio = size.run_ratio(one)
    assert ratio is not None
    assert ratio.value == (20 * 2 + 30 * 4) / (9 * 2 + 10 * 4)
    assert size.run_flops(one) < 0.4 * size.run_flops(base)
    (told,) = [line for line in remarks(size) if line.startswith("one computes")]
    assert "19 of 50 evaluations" in told


def test_ratios_are_of_the_same_round() -> None:
    """The machine is ten times slower in one round, for all: medians of each would say something else."""
    assert Ratio.of([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == Ratio(3.0, 2.0, 4.0)


def test_a_run_is_counted_by_the_plan() -> None:
    base, one = times("base", [2.0, 2.0, 8.0], [4.0, 4.0, 4.0]), times("one", [1.0, 1.0, 2.0], [2.0, 2.0, 2.0])
    size = SizeTimes(WORK, (base, one), "base")
    assert size.run_seconds(base) == 20 * 2 + 30 * 4
    assert size.run_seconds(one, "processor") == 2 * (20 * 1 + 30 * 2)
    assert size.phase_ratio(one, FIRST) == Ratio(2.0, 2.0, 4.0)
    assert size.run_ratio(one) == Ratio(2.0, 2.0, (20 * 8 + 30 * 4) / (20 * 2 + 30 * 2))
    assert one.ready == 7.0


def test_without_hidiffusion_all_evaluations_are_of_one_kind() -> None:
    stock = times("stock", [1.0, 1.0, 2.0], [3.0, 3.0, 3.0], hidiffusion=False)
    size = SizeTimes(WORK, (stock,), "stock")
    assert size.evaluation_seconds(stock, FIRST) == size.evaluation_seconds(stock, SECOND) == 2.5
    assert size.run_seconds(stock) == 50 * 2.5
    assert size.run_flops(stock) == 50 * WORK.stock_flops


def test_a_base_that_failed_leaves_no_ratios() -> None:
    base, one = times("base", [], []), times("one", [1.0], [1.0])
    base.failure = "no memory"
    size = SizeTimes(WORK, (base, one), "base")
    assert (size.reference, size.run_ratio(one), size.phase_ratio(one, FIRST)) == (None, None, None)
    assert size.finished == (one,)


def test_decibels() -> None:
    exact = np.array([3.0, 4.0], np.float32)
    assert signal_to_noise(exact, exact) == EQUAL
    assert signal_to_noise(exact, np.array([3.0, 4.05], np.float32)) == pytest.approx(40, abs=0.01)
    assert signal_to_noise(exact, np.array([3.0, np.nan], np.float32)) == NO_NUMBERS
    assert signal_to_noise(exact, np.array([3.0, np.inf], np.float32)) == NO_NUMBERS


def test_the_lowest_decibels_of_any_phase_are_told() -> None:
    one = times("one", [1.0], [1.0])
    assert one.decibels is None
    one.phases[FIRST].decibels, one.phases[SECOND].decibels = [50.0, 40.0], [45.0]
    assert one.decibels == 40.0
