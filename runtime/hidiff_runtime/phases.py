"""Which of HiDiffusion's changes are in force at which step.

The one place where a step becomes a phase. Fractions are of the number of *logical denoising steps*, and the
float expression ``int(steps * fraction)`` is the published package's own, truncation included: with 90, 170 or 180
steps ``int(steps * 0.7)`` is one lower than the exact product.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache

from hidiff_runtime.errors import InputError
from hidiff_runtime.reused_features import Reuse

_OMITTED = {"absent": True, "omitted": True}
"""What `hidiff_runtime.format.record_codec` calls so, which is above: older files do not have these fields."""


class PhaseKind(str, Enum):
    """Which RAU-Net changes a UNet has; attention windows are on in every kind."""

    STRIDED = "strided"
    POOLED = "pooled"
    STRIDED_POOLED = "strided_pooled"
    WINDOWED = "windowed"

    @classmethod
    def of(cls, strided: bool, pooled: bool) -> PhaseKind:
        """Returns the kind with these two changes in force."""
        if strided:
            return cls.STRIDED_POOLED if pooled else cls.STRIDED
        return cls.POOLED if pooled else cls.WINDOWED

    @property
    def strided(self) -> bool:
        """Whether the stride-4 downsampler is in force."""
        return self in (PhaseKind.STRIDED, PhaseKind.STRIDED_POOLED)

    @property
    def pooled(self) -> bool:
        """Whether the average pool and its bicubic inverse are in force."""
        return self in (PhaseKind.POOLED, PhaseKind.STRIDED_POOLED)


@dataclass(frozen=True)
class Phase:
    """One distinct graph.

    Args:
        kind: which RAU-Net changes are in force.
        control: whether ControlNet residuals come in.
        unguided: whether the prompts are evaluated without the negative ones, where the bundle has guidance.
        shallow: whether the outermost layers alone are computed, and the deep features come in.
    """

    kind: PhaseKind
    control: bool = False
    unguided: bool = field(default=False, metadata=_OMITTED)
    shallow: bool = field(default=False, metadata=_OMITTED)

    @property
    def name(self) -> str:
        """The phase's name in file names and reports: ``strided``, ``strided-control``, ``windowed-unguided``, …."""
        more = [name for name in ("control", "unguided", "shallow") if getattr(self, name)]
        return "-".join((self.kind.value, *more))


@dataclass(frozen=True)
class StepRange:
    """The steps ``int(steps * start) <= i < int(steps * end)``."""

    start: float
    end: float

    def covers(self, step: int, steps: int) -> bool:
        """Returns whether ``step`` of ``steps`` lies in the range."""
        return int(steps * self.start) <= step < int(steps * self.end)

    def first_and_end(self, steps: int) -> tuple[int, int]:
        """Returns the first step of the part, not truncated but rounded up, and the first one after it: with an end
        above 0 the shortest run has a step before it.
        """
        return math.ceil(steps * self.start), math.ceil(steps * self.end)


@dataclass(frozen=True)
class PhaseRule:
    """When each change is in force; ``None`` means never.

    Args:
        strided: steps with the stride-4 downsampler.
        pooled: steps with the average pool and bicubic pair.
        control: ControlNet residuals come in while ``step < control * steps`` (not truncated, as published).
        guidance: steps that are guided, of a bundle with guidance, as `StepRange.first_and_end` counts them; ``None``
            means all of them.
        reuse: how deep features are reused; ``None`` means never.
    """

    strided: StepRange | None = None
    pooled: StepRange | None = None
    control: float | None = None
    guidance: StepRange | None = None
    reuse: Reuse | None = None

    def phase_at(self, step: int, steps: int) -> Phase:
        """Returns the phase of logical step ``step`` (from 0) in a run of ``steps``, all its layers computed."""
        kind = PhaseKind.of(
            strided=self.strided is not None and self.strided.covers(step, steps),
            pooled=self.pooled is not None and self.pooled.covers(step, steps),
        )
        control = self.control is not None and step < self.control * steps
        if self.guidance is None:
            return Phase(kind, control=control)
        first, end = self.guidance.first_and_end(steps)
        return Phase(kind, control=control, unguided=not first <= step < end)

    def gives_features(self, phase: Phase) -> bool:
        """Returns whether the phase's graph gives deep features, which a shallow one takes."""
        return not phase.shallow and replace(phase, shallow=True) in self.phases()

    @property
    def whole(self) -> PhaseRule:
        """The same changes with nothing left out: every step guided, every feature computed."""
        return replace(self, guidance=None, reuse=None)

    def phases(self) -> tuple[Phase, ...]:
        """Returns every distinct phase that some number of steps reaches, in running order; guided ones come before the
        others, and each before its shallow one. A bundle has a graph of each.

        At 10,000 steps no phase is lost to truncation. Short runs can reach one more, because the end of the
        ControlNet residuals is not truncated while the others are: with two steps, pooled below 0.7 and residuals
        below 0.6, the second step has residuals but no pool.
        """
        return _phases_of(self)


@lru_cache(maxsize=64)  # a bundle asks again and again for its one rule's phases, which a hundred runs are counted for
def _phases_of(rule: PhaseRule) -> tuple[Phase, ...]:
    runs = (10_000, *range(1, 101))
    rules = (rule,) if rule.guidance is None else (rule, rule.whole)  # a request may ask for guidance all through
    reached = dict.fromkeys(
        replace(phase, shallow=shallow)
        for each in rules
        for steps in runs
        for phase in PhasePlan(each, steps).phases
        for shallow in ((False,) if each.reuse is None else (False, True))
    )
    return tuple(sorted(reached, key=lambda phase: phase.unguided))


@dataclass(frozen=True)
class PhaseSpan:
    """Consecutive steps of one phase, both ends included."""

    phase: Phase
    first: int
    last: int

    @property
    def steps(self) -> int:
        """How many steps the span has."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class PhasePlan:
    """The phases of a run of ``steps`` logical denoising steps.

    Raises:
        InputError: ``steps`` is not a positive whole number.
    """

    rule: PhaseRule
    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError("A run needs at least one step.", given=self.steps, advice="Ask for 1 step or more.")

    def phase_at(self, step: int) -> Phase:
        """Returns the phase of logical step ``step``, counted from 0."""
        if not 0 <= step < self.steps:
            raise InputError(f"Step {step} is outside this run.", given=step, advice=f"Ask for 0 to {self.steps - 1}.")
        return self.rule.phase_at(step, self.steps)

    @property
    def spans(self) -> tuple[PhaseSpan, ...]:
        """Runs of equal phase in running order, all layers computed; phases of no step are left out."""
        edges = {0, self.steps}
        for span in (self.rule.strided, self.rule.pooled):
            if span is not None:
                edges |= {int(self.steps * span.start), int(self.steps * span.end)}
        if self.rule.guidance is not None:
            edges |= {*self.rule.guidance.first_and_end(self.steps)}
        if self.rule.control is not None:
            edges.add(math.ceil(self.rule.control * self.steps))
        marks = itertools.pairwise(sorted(edge for edge in edges if 0 <= edge <= self.steps))
        parts = [PhaseSpan(self.phase_at(first), first, after - 1) for first, after in marks]
        runs = [list(equal) for _, equal in itertools.groupby(parts, lambda part: part.phase)]
        return tuple(PhaseSpan(run[0].phase, run[0].first, run[-1].last) for run in runs)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The distinct phases of this run, all layers computed, in the order they first run."""
        return tuple(dict.fromkeys(span.phase for span in self.spans))
