"""Which evaluations stand for all of a bundle: a short run, and calls on both sides of each phase change.

Every phase has to be among them, and both sides of each change from one phase to the next, in as little time as that
takes: at full size one evaluation on a CPU is a matter of minutes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
    def leaves_out(self) -> tuple[bool, bool, bool]:
        """Whether evaluations are forecast, layers left to features of an earlier one, and steps not guided."""
        phases = [point.phase for point in self.points]
        return (
            len(self.points) < len(self.timesteps),
            any(phase.shallow for phase in phases),
            any(phase.unguided for phase in phases),
        )

    @property
    def logical_steps(self) -> int:
        """Denoising steps, as phases count them."""
        return math.ceil(len(self.timesteps) / self.order)

    @cached_property
    def points(self) -> tuple[EvaluationPoint, ...]:
        """Every evaluation that is computed."""
        steps, total = self.logical_steps, len(self.timesteps)
        computed = computed_of(self.forecast, total)
        whole = [self.rule.phase_at(index // self.order, steps) for index in range(total)]
        reuse = self.rule.reuse
        shallow = (False,) * total if reuse is None else reuse.shallow(whole, computed)
        return tuple(
            EvaluationPoint(replace(whole[index], shallow=shallow[index]), index // self.order, steps, timestep)
            for index, timestep in enumerate(self.timesteps)
            if computed[index]
        )

    @cached_property
    def edges(self) -> tuple[tuple[EvaluationPoint, EvaluationPoint], ...]:
        """The last evaluation of a phase and the first of the next, for each change but of the layers that are
        computed.
        """
        pairs = zip(self.points, self.points[1:], strict=False)
        return tuple((before, after) for before, after in pairs if _whole(before.phase) != _whole(after.phase))

    @property
    def changes(self) -> frozenset[tuple[Phase, Phase]]:
        """From which phase to which the run goes, whichever layers are computed there."""
        return frozenset((_whole(before.phase), _whole(after.phase)) for before, after in self.edges)

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

    One that leaves out more kinds of work comes before all that leave out fewer.
    """
    return max(
        courses,
        key=lambda course: (sum(course.leaves_out), len(course.changes), len(course.phases), -len(course.points)),
        default=None,
    )


def recorded(courses: Sequence[RunSchedule], flops: Callable[[Phase], float]) -> RunSchedule | None:
    """Returns the run that a build records: the fullest of those that are short or cheap, if there is one.

    Args:
        flops: of one evaluation of a phase.
    """

    # A forecast takes a warm-up before it, and evaluations after it to show what came of it; reused features likewise.
    most = max((sum(course.leaves_out) for course in courses), default=0)
    saving = (len(course.points) for course in courses if most and sum(course.leaves_out) == most)
    few = min(saving, default=FEW_EVALUATIONS)

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
        run: leaves out the changes and phases that this run goes through, and that samples of it are kept of.
    """
    whole = fullest(courses)
    done, done_phases = (frozenset(), frozenset()) if run is None else (run.changes, run.phases)
    edges = () if whole is None else whole.edges
    points = [point for edge in edges if (_whole(edge[0].phase), _whole(edge[1].phase)) not in done for point in edge]
    seen = {point.phase for point in points} | {phase for phase in done_phases if keeps_samples(phase)}
    points += [_somewhere(rule, phase) for phase in rule.phases() if phase not in seen]
    return tuple(dict.fromkeys(points))


def keeps_samples(phase: Phase) -> bool:
    """Returns whether a run's evaluations in a phase are kept as samples: deep features are too large, and so are
    residuals for the prompts alone, which are half of what a seed stands for.
    """
    return not phase.shallow and not (phase.control and phase.unguided)


def one_of_each(rule: PhaseRule) -> tuple[EvaluationPoint, ...]:
    """Returns one evaluation of each phase."""
    return tuple(_somewhere(rule, phase) for phase in rule.phases())


def _whole(phase: Phase) -> Phase:
    """Returns the phase with all layers computed."""
    return replace(phase, shallow=False)


def _somewhere(rule: PhaseRule, phase: Phase) -> EvaluationPoint:
    """Returns the first step of ``phase`` in the shortest run that has one, its timestep as if evenly spaced; of a
    shallow one the step after.
    """
    # A guided run may be asked for all through, and reach phases that none else does.
    plans = (PhasePlan(each, steps) for steps in itertools.count(1) for each in (rule, rule.whole))
    step, steps = next(
        (span.first + phase.shallow, plan.steps)
        for plan in plans
        for span in plan.spans
        if span.phase == _whole(phase) and span.steps > phase.shallow
    )
    return EvaluationPoint(phase, step, steps, float(round(_LAST_TIMESTEP * (1 - step / steps))))
