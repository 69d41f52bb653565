"""Which evaluations stand for all of a bundle: a short run, and calls on both sides of each phase change.

Every phase has to be among them, and both sides of each change from one phase to the next, in as little time as that
takes: at full size one evaluation on a CPU is a matter of minutes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from hidiff_runtime.format.forecast_record import Forecast, computed_of
from hidiff_runtime.phases import Phase, PhasePlan, PhaseRule
from hidiff_runtime.verification.replay import FEW_EVALUATIONS

LITTLE_WORK = 8e12
"""What costs next to nothing, in floating-point operations: about a minute on a laptop's processor."""

_LAST_TIMESTEP = 999


@dataclass(frozen=True)
class RunSchedule:
    """A run of ``steps``, as a sampler lays it out.

    Args:
        rule: which phase runs at which logical step.
        steps: asked of the sampler.
        timesteps: one for each evaluation of the UNet.
        order: evaluations of a logical step; the last step of a second-order sampler has one less.
        forecast: which evaluations are computed; None for all.
    """

    rule: PhaseRule
    steps: int
    timesteps: tuple[float, ...]
    order: int = 1
    forecast: Forecast | None = None

    @property
    def forecasts(self) -> bool:
        """Whether evaluations are left out."""
        return len(self.points) < len(self.timesteps)

    @property
    def logical_steps(self) -> int:
        """Denoising steps, as phases count them."""
        return math.ceil(len(self.timesteps) / self.order)

    @cached_property
    def points(self) -> tuple[EvaluationPoint, ...]:
        """Every evaluation that is computed."""
        steps, total = self.logical_steps, len(self.timesteps)
        computed = computed_of(self.forecast, total)
        return tuple(
            EvaluationPoint(self.rule.phase_at(index // self.order, steps), index // self.order, steps, timestep)
            for index, timestep in enumerate(self.timesteps)
            if computed[index]
        )

    @cached_property
    def edges(self) -> tuple[tuple[EvaluationPoint, EvaluationPoint], ...]:
        """The last evaluation of a phase and the first of the next, for each change."""
        pairs = zip(self.points, self.points[1:], strict=False)
        return tuple((before, after) for before, after in pairs if before.phase != after.phase)

    @property
    def changes(self) -> frozenset[tuple[Phase, Phase]]:
        """From which phase to which the run goes."""
        return frozenset((before.phase, after.phase) for before, after in self.edges)

    @property
    def phases(self) -> frozenset[Phase]:
        """The phases the run goes through."""
        return frozenset(point.phase for point in self.points)


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation: its phase, its logical step (from 0) of how many, and the timestep the UNet is told."""

    phase: Phase
    step: int
    steps: int
    timestep: float

    def __str__(self) -> str:
        return f"{self.phase.name}, step {self.step + 1} of {self.steps}"


def fullest(courses: Iterable[RunSchedule]) -> RunSchedule | None:
    """Returns the run with the most phase changes; of equals the one with most phases, then fewest evaluations.

    One that forecasts comes before all that do not.
    """
    return max(
        courses,
        key=lambda course: (course.forecasts, len(course.changes), len(course.phases), -len(course.points)),
        default=None,
    )


def recorded(courses: Sequence[RunSchedule], flops: Callable[[Phase], float]) -> RunSchedule | None:
    """Returns the run that a build records: the fullest of those that are short or cheap, if there is one.

    Args:
        flops: of one evaluation of a phase.
    """

    # A forecast takes a warm-up before it, and evaluations after it to show what came of it.
    few = min((len(course.points) for course in courses if course.forecasts), default=FEW_EVALUATIONS)

    def affordable(course: RunSchedule) -> bool:
        cost = sum(flops(point.phase) for point in course.points)
        return len(course.points) <= max(few, FEW_EVALUATIONS) or cost <= LITTLE_WORK

    return fullest(course for course in courses if affordable(course))


def edge_points(
    rule: PhaseRule, courses: Iterable[RunSchedule], run: RunSchedule | None = None
) -> tuple[EvaluationPoint, ...]:
    """Returns evaluations on both sides of each phase change, and one of each phase that takes part in none.

    Args:
        rule: whose phases all have to be there, those of unusual step counts included.
        courses: every run there can be; the changes are those of the fullest.
        run: leaves out the changes and phases that this run goes through.
    """
    whole = fullest(courses)
    done = frozenset() if run is None else run.changes
    edges = () if whole is None else whole.edges
    points = [point for edge in edges if (edge[0].phase, edge[1].phase) not in done for point in edge]
    seen = {point.phase for point in points} | (frozenset() if run is None else run.phases)
    points += [_somewhere(rule, phase) for phase in rule.phases() if phase not in seen]
    return tuple(dict.fromkeys(points))


def one_of_each(rule: PhaseRule) -> tuple[EvaluationPoint, ...]:
    """Returns one evaluation of each phase."""
    return tuple(_somewhere(rule, phase) for phase in rule.phases())


def _somewhere(rule: PhaseRule, phase: Phase) -> EvaluationPoint:
    """Returns the first step of ``phase`` in the shortest run that has one, its timestep as if evenly spaced."""
    plans = (PhasePlan(rule, steps) for steps in itertools.count(1))
    step, steps = next((span.first, plan.steps) for plan in plans for span in plan.spans if span.phase == phase)
    return EvaluationPoint(phase, step, steps, float(round(_LAST_TIMESTEP * (1 - step / steps))))
