"""What was measured of each contender, and what follows from it: medians, and ratios of evaluations taken in turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hidiff_export.benchmarking.contender_process import Competitor
from hidiff_export.benchmarking.savings import combinations
from hidiff_export.benchmarking.workload import Workload
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import PhaseRule

EQUAL, NO_NUMBERS = 300.0, -300.0
"""Decibels beyond any that float32 can have, for JSON has no infinity."""


@dataclass
class PhaseTimes:
    """Of a contender's evaluations in one phase, one a round.

    Args:
        opened: seconds until the phase was ready.
        first: seconds of the evaluation before the rounds, which takes memory and, of some, compiles.
        wall: seconds of each round's evaluation.
        processor: seconds of all cores together, of the same evaluations.
        decibels: signal-to-noise ratio of what they gave, beside `peers.REFERENCES` on the same inputs; none where that
            is not measured.
        operators: seconds of each kind of operator in one further evaluation, the longest first.
    """

    opened: float = 0.0
    first: float = 0.0
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    decibels: list[float] = field(default_factory=list)
    operators: dict[str, float] = field(default_factory=dict)


@dataclass
class ContenderTimes:
    """Of one contender at one size.

    Args:
        competitor: which.
        started: seconds until its libraries and weights were there.
        memory: the most bytes that its process held.
        phases: by name; of one that failed those that it came to.
        failure: why it is out of the running; empty where it is not.
        profile_failure: why its operators are not told; empty where they are, or nobody asked.
    """

    competitor: Competitor
    started: float = 0.0
    memory: int = 0
    phases: dict[str, PhaseTimes] = field(default_factory=dict)
    failure: str = ""
    profile_failure: str = ""

    @property
    def ready(self) -> float:
        """Seconds from the start of its process to the end of the first phase's first evaluation."""
        first = next(iter(self.phases.values()))
        return self.started + first.opened + first.first

    @property
    def decibels(self) -> float | None:
        """The lowest of any evaluation; None where none was compared."""
        found = [value for times in self.phases.values() for value in times.decibels]
        return min(found) if found else None


@dataclass(frozen=True)
class Ratio:
    """How many times faster, by evaluations of the same round: the median, and the least and the most of any round."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, base: Sequence[float], one: Sequence[float]) -> Ratio:
        """Returns the ratio of the base's seconds to the others, round by round."""
        found = [slow / fast for slow, fast in zip(base, one, strict=True)]
        return cls(median(found), min(found), max(found))


@dataclass(frozen=True)
class SavedRun:
    """A bundle's run with some of what it leaves out.

    Args:
        name: what it leaves out.
        evaluations: that it computes.
        flops: of all of them.
        seconds: of all of them, by the medians of their phases.
    """

    name: str
    evaluations: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class SizeTimes:
    """Everything measured at one size.

    Args:
        work: what was computed.
        contenders: in the order that they are shown.
        base: the name of the one that others are compared with.
        left_out: peers that are not measured at this size: why, by name.
    """

    work: Workload
    contenders: tuple[ContenderTimes, ...]
    base: str
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> tuple[ContenderTimes, ...]:
        """Those that did not fail."""
        return tuple(one for one in self.contenders if not one.failure)

    @property
    def reference(self) -> ContenderTimes | None:
        """What ratios are of: the base, where it did not fail."""
        return next((one for one in self.finished if one.competitor.name == self.base), None)

    def flops(self, one: ContenderTimes, phase: str) -> int:
        """Returns the operations of one of its evaluations in a phase."""
        if not one.competitor.hidiffusion:
            return self.work.stock_flops
        return next(planned.flops for planned in self.work.phases if planned.phase.name == phase)

    def run_flops(self, one: ContenderTimes) -> int:
        """Returns the operations of the whole run."""
        return sum(count * self.flops(one, name) for name, count in self.counts(one).items())

    def run_seconds(self, one: ContenderTimes, clock: str = "wall") -> float:
        """Returns the seconds of the whole run: each phase's `evaluation_seconds`, as often as the run has it.

        Args:
            one: which contender.
            clock: ``wall`` or ``processor``.
        """
        return sum(count * self.evaluation_seconds(one, name, clock) for name, count in self.counts(one).items())

    def counts(self, one: ContenderTimes) -> dict[str, int]:
        """Returns how many evaluations of each phase the run computes; forecast ones take no time worth counting."""
        return self._counted_by(self.rule(one), one.competitor.forecast)

    def savings(self, one: ContenderTimes) -> list[SavedRun]:
        """Returns what a bundle's run takes with each combination of what it leaves out; none where that is nothing."""
        found = []
        for saving in combinations(self.work.rule, one.competitor.forecast) if one.competitor.bundle else ():
            counts = self._counted_by(saving.rule, saving.forecast)
            flops = sum(count * self.flops(one, name) for name, count in counts.items())
            taken = sum(count * self.evaluation_seconds(one, name) for name, count in counts.items())
            found.append(SavedRun(saving.name, sum(counts.values()), flops, taken))
        return found

    def rule(self, one: ContenderTimes) -> PhaseRule:
        """Returns when each phase of its run is in force: what is no bundle leaves nothing out."""
        return self.work.rule if one.competitor.bundle else self.work.rule.whole

    def _counted_by(self, rule: PhaseRule, forecast: Forecast | None) -> dict[str, int]:
        names = [planned.phase.name for planned in self.work.phases]
        counts = {name: self.work.count(name, rule, forecast) for name in names}
        return {name: count for name, count in counts.items() if count}

    def evaluation_seconds(self, one: ContenderTimes, phase: str, clock: str = "wall") -> float:
        """Returns the median of a phase's evaluations; without HiDiffusion, where all are of one kind, that of all."""
        alike = [one.phases[phase]] if one.competitor.hidiffusion else one.phases.values()
        taken: list[float] = [seconds for times in alike for seconds in getattr(times, clock)]
        return median(taken)

    def phase_ratio(self, one: ContenderTimes, phase: str) -> Ratio | None:
        """Returns how many times faster than the base an evaluation is; None where there is no base."""
        base = self.reference
        if base is None or phase not in base.phases:
            return None
        return Ratio.of(base.phases[phase].wall, one.phases[phase].wall)

    def run_ratio(self, one: ContenderTimes) -> Ratio | None:
        """Returns how many times faster than the base the run is; None where there is no base."""
        base = self.reference
        return None if base is None else Ratio.of(self._run_of_each_round(base), self._run_of_each_round(one))

    def _run_of_each_round(self, one: ContenderTimes) -> list[float]:
        rounds = zip(*([count * seconds for seconds in times.wall] for count, times in self._counted(one)), strict=True)
        return [sum(seconds) for seconds in rounds]

    def _counted(self, one: ContenderTimes) -> Iterable[tuple[int, PhaseTimes]]:
        return [(count, one.phases[name]) for name, count in self.counts(one).items()]


def signal_to_noise(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Returns decibels; `EQUAL` for equal arrays, `NO_NUMBERS` where there is an infinity or a NaN."""
    difference = found.astype(np.float64) - expected
    noise, signal = float((difference**2).sum()), float((expected.astype(np.float64) ** 2).sum())
    if not math.isfinite(noise):
        return NO_NUMBERS
    return 10 * math.log10(signal / noise) if noise and signal else EQUAL
