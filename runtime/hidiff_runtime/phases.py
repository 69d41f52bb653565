"""Which of HiDiffusion's changes are in force at which step.

The one place where a step becomes a phase. Fractions are of the number of *logical denoising steps*, and the
float expression ``int(steps * fraction)`` is the published package's own, truncation included: with 90, 170 or 180
steps ``int(steps * 0.7)`` is one lower than the exact product.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from hidiff_runtime.errors import InputError


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
    """One distinct graph: a kind, and whether ControlNet residuals come in."""

    kind: PhaseKind
    control: bool = False

    @property
    def name(self) -> str:
        """The phase's name in file names and reports: ``strided`` or ``strided-control``."""
        return f"{self.kind.value}-control" if self.control else self.kind.value


@dataclass(frozen=True)
class StepRange:
    """The steps ``int(steps * start) <= i < int(steps * end)``."""

    start: float
    end: float

    def covers(self, step: int, steps: int) -> bool:
        """Returns whether ``step`` of ``steps`` lies in the range."""
        return int(steps * self.start) <= step < int(steps * self.end)


@dataclass(frozen=True)
class PhaseRule:
    """When each change is in force; ``None`` means never.

    Args:
        strided: steps with the stride-4 downsampler.
        pooled: steps with the average pool and bicubic pair.
        control: ControlNet residuals come in while ``step < control * steps`` (not truncated, as published).
    """

    strided: StepRange | None = None
    pooled: StepRange | None = None
    control: float | None = None

    def phase_at(self, step: int, steps: int) -> Phase:
        """Returns the phase of logical step ``step`` (from 0) in a run of ``steps``."""
        kind = PhaseKind.of(
            strided=self.strided is not None and self.strided.covers(step, steps),
            pooled=self.pooled is not None and self.pooled.covers(step, steps),
        )
        return Phase(kind, control=self.control is not None and step < self.control * steps)

    def phases(self) -> tuple[Phase, ...]:
        """Returns every distinct phase that some number of steps reaches, in running order.

        At 10,000 steps no phase is lost to truncation. Short runs can reach one more, because the end of the
        ControlNet residuals is not truncated while the others are: with two steps, pooled below 0.7 and residuals
        below 0.6, the second step has residuals but no pool.
        """
        return _phases_of(self)


@lru_cache(maxsize=64)  # a bundle asks again and again for its one rule's phases, which a hundred runs are counted for
def _phases_of(rule: PhaseRule) -> tuple[Phase, ...]:
    runs = (10_000, *range(1, 101))
    return tuple(dict.fromkeys(phase for steps in runs for phase in PhasePlan(rule, steps).phases))


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
        """Runs of equal phase in running order; phases of no step are left out."""
        edges = {0, self.steps}
        for span in (self.rule.strided, self.rule.pooled):
            if span is not None:
                edges |= {int(self.steps * span.start), int(self.steps * span.end)}
        if self.rule.control is not None:
            edges.add(math.ceil(self.rule.control * self.steps))
        marks = itertools.pairwise(sorted(edge for edge in edges if 0 <= edge <= self.steps))
        parts = [PhaseSpan(self.phase_at(first), first, after - 1) for first, after in marks]
        runs = [list(equal) for _, equal in itertools.groupby(parts, lambda part: part.phase)]
        return tuple(PhaseSpan(run[0].phase, run[0].first, run[-1].last) for run in runs)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The distinct phases of this run, in the order they first run."""
        return tuple(dict.fromkeys(span.phase for span in self.spans))
