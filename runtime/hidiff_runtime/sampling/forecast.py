"""Forecast steps: evaluations that are not computed, because the outputs computed before say what they would give.

The UNet's output changes smoothly along a run. That of an evaluation that is left out is taken from a polynomial of its
number, fitted to the last outputs that were computed, and from the straight line through the last two: half of each.
Both are linear in these outputs, and their weights follow from the numbers alone. So a forecast is a row of
coefficients like a sampler's own, over outputs that are kept as the sampler's states are, and runs wherever a sampler
table does. The method is Spectrum's (arXiv 2603.01623), on the UNet's output where that takes the features before the
last layer, which a table could not reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hidiff_runtime.errors import InputError
from hidiff_runtime.format.forecast_record import UNSUITABLE, Forecast
from hidiff_runtime.sampling.scheduler_state import NOISE, OUTPUT, STATE, Evaluation, FloatArray, Schedule

DEGREE = 4
"""Of the polynomial, as published."""

RIDGE = 0.1
"""How much the polynomial's coefficients are held down (the ridge fit's lambda), as published for images."""

BLEND = 0.5
"""The polynomial's part of a forecast, as published for SDXL; the line has the rest."""

KEPT = 6
"""Outputs that are kept, each as large as the latents. The published code keeps all of them; with 10 or 16 the demo
model's pictures come no closer to those of full runs."""


def weights(computed: Sequence[int], index: int, evaluations: int) -> FloatArray:
    """Returns what each computed output counts in a forecast, float64.

    Args:
        computed: which evaluations of the run gave them, rising, two or more.
        index: of the evaluation that is forecast, from 0.
        evaluations: of the run, which Chebyshev's polynomials are spread over.
    """
    basis = np.polynomial.chebyshev.chebvander(2 * np.array([*computed, index]) / evaluations - 1, DEGREE)
    given, wanted = basis[:-1], basis[-1]
    fitted = np.linalg.solve(given.T @ given + RIDGE * np.eye(DEGREE + 1), given.T)
    found: FloatArray = BLEND * (wanted @ fitted)
    before, last = computed[-2:]
    ahead = (index - last) / (last - before)
    found[-2:] += (1 - BLEND) * np.array([-ahead, 1 + ahead])
    return found


def forecast_schedule(schedule: Schedule, forecast: Forecast) -> Schedule:
    """Returns a run in which the evaluations that ``forecast`` leaves out are rows over kept outputs.

    Raises:
        InputError: the sampler's outputs follow no curve.
    """
    if reason := UNSUITABLE.get(schedule.sampler):
        raise InputError(
            f"Steps of the sampler {schedule.sampler} cannot be forecast: {reason}.",
            given=f"sampler {schedule.sampler}, in a bundle that forecasts steps",
            advice="Choose another sampler, or ask for a full run.",
        )
    total = len(schedule)
    computed = forecast.computed(total)
    known: list[int] = []
    evaluations = []
    for index, evaluation in enumerate(schedule.evaluations):
        if computed[index]:
            evaluations.append(_keeping(evaluation))
            known = [*known, index][-KEPT:]
        else:
            evaluations.append(_left_out(evaluation, weights(known, index, total)))
    return replace(schedule, evaluations=tuple(evaluations))


def _keeping(evaluation: Evaluation) -> Evaluation:
    """Returns an evaluation that keeps its output; of those kept before, the first is forgotten."""
    rows = _widened(evaluation.rows)
    states = len(evaluation.rows)
    rows[-1, OUTPUT] = 1
    for place in range(states, len(rows) - 1):
        rows[place, STATE + place] = 1  # the place behind it
    return replace(evaluation, rows=rows)


def _left_out(evaluation: Evaluation, counts: FloatArray) -> Evaluation:
    """Returns an evaluation whose output is a sum of kept ones, the last of them last."""
    rows = _widened(evaluation.rows)
    rows[:, -len(counts) :] += rows[:, OUTPUT, None] * counts
    rows[:, OUTPUT] = 0
    for place in range(len(evaluation.rows), len(rows)):
        rows[place, NOISE + place] = 1
    return replace(evaluation, rows=rows, computed=False)


def _widened(rows: FloatArray) -> FloatArray:
    return np.pad(rows, ((0, KEPT), (0, KEPT)))
