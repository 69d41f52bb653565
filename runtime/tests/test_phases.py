from __future__ import annotations

from itertools import pairwise

import pytest

from hidiff_runtime.errors import InputError
from hidiff_runtime.phases import Phase, PhaseKind, PhasePlan, PhaseRule, StepRange
from hidiff_runtime.reused_features import Reuse

BOTH = PhaseRule(strided=StepRange(0, 0.3), pooled=StepRange(0, 0.7))
CONTROLLED = PhaseRule(strided=StepRange(0, 8 / 50), pooled=StepRange(8 / 50, 0.5), control=0.6)


def counted(rule: PhaseRule, steps: int) -> list[tuple[str, int]]:
    return [(span.phase.name, span.steps) for span in PhasePlan(rule, steps).spans]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_kind_is_its_two_changes(strided: bool, pooled: bool) -> None:
    kind = PhaseKind.of(strided, pooled)
    assert (kind.strided, kind.pooled) == (strided, pooled)


@pytest.mark.parametrize("rule", [BOTH, CONTROLLED, PhaseRule()], ids=["both", "controlled", "none"])
def test_spans_cover_every_step_with_its_phase(rule: PhaseRule) -> None:
    reachable = set(rule.phases())
    for steps in range(1, 201):
        plan = PhasePlan(rule, steps)
        covered = [(step, span.phase) for span in plan.spans for step in range(span.first, span.last + 1)]
        assert covered == [(step, rule.phase_at(step, steps)) for step in range(steps)]
        assert all(one.phase != two.phase for one, two in pairwise(plan.spans))
        assert set(plan.phases) <= reachable


@pytest.mark.parametrize(
    ("rule", "steps", "expected"),
    [
        (BOTH, 50, [("strided_pooled", 15), ("pooled", 20), ("windowed", 15)]),
        (BOTH, 4, [("strided_pooled", 1), ("pooled", 1), ("windowed", 2)]),
        (CONTROLLED, 50, [("strided-control", 8), ("pooled-control", 17), ("windowed-control", 5), ("windowed", 20)]),
        (CONTROLLED, 4, [("pooled-control", 2), ("windowed-control", 1), ("windowed", 1)]),
        (PhaseRule(), 3, [("windowed", 3)]),
    ],
)
def test_published_counts(rule: PhaseRule, steps: int, expected: list[tuple[str, int]]) -> None:
    assert counted(rule, steps) == expected


@pytest.mark.parametrize(("steps", "last"), [(90, 61), (170, 117), (180, 124), (100, 69)])
def test_the_end_is_truncated_as_a_float_product(steps: int, last: int) -> None:
    """90 * 0.7 is 62.99…, so the published code stops one step before 63."""
    assert [span.last for span in PhasePlan(BOTH, steps).spans if span.phase.kind is PhaseKind.POOLED] == [last]


def test_every_phase_is_found_once_in_running_order() -> None:
    assert [phase.name for phase in BOTH.phases()] == ["strided_pooled", "pooled", "windowed"]
    short = PhaseRule(strided=StepRange(0, 0.3), pooled=StepRange(0, 0.7), control=0.6)
    assert Phase(PhaseKind.WINDOWED, control=True) in PhasePlan(short, 2).phases
    assert Phase(PhaseKind.WINDOWED, control=True) in short.phases()


@pytest.mark.parametrize("steps", [0, -1, 2.0, "3", True, None])
def test_a_run_needs_a_whole_number_of_steps(steps: object) -> None:
    with pytest.raises(InputError):
        PhasePlan(BOTH, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [-1, 4])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(InputError, match="outside this run"):
        PhasePlan(BOTH, 4).phase_at(step)


def test_steps_outside_the_guided_ones_are_phases_of_their_own() -> None:
    rule = PhaseRule(strided=StepRange(0, 0.4), control=0.7, guidance=StepRange(0.1, 0.6))
    assert counted(rule, 50) == [
        ("strided-control-unguided", 5),
        ("strided-control", 15),
        ("windowed-control", 10),
        ("windowed-control-unguided", 5),
        ("windowed-unguided", 15),
    ]


def test_guided_phases_come_first_those_of_a_whole_run_among_them() -> None:
    """A request may ask for guidance all through, and then reaches a phase that the rule does not."""
    rule = PhaseRule(strided=StepRange(0, 0.4), guidance=StepRange(0, 0.3), reuse=Reuse(3))
    names = [phase.name for phase in rule.phases()]
    assert names == [
        *("strided", "strided-shallow", "windowed", "windowed-shallow"),  # the last two in runs of one step
        *("strided-unguided", "strided-unguided-shallow", "windowed-unguided", "windowed-unguided-shallow"),
    ]
    late = PhaseRule(strided=StepRange(0, 0.4), pooled=StepRange(0.4, 1), guidance=StepRange(0.5, 0.8))
    assert [phase.name for phase in late.phases() if not phase.unguided] == ["pooled", "strided"]
    assert counted(rule.whole, 50) == [("strided", 20), ("windowed", 30)]
    assert {phase for phase in rule.whole.phases() if phase.unguided or phase.shallow} == set()


def test_the_shortest_run_is_guided() -> None:
    """The part that is guided is rounded up: a run of one step is guided, whatever the part."""
    rule = PhaseRule(guidance=StepRange(0, 0.01))
    assert counted(rule, 1) == [("windowed", 1)]
    assert counted(rule, 50) == [("windowed", 1), ("windowed-unguided", 49)]
    assert counted(PhaseRule(guidance=StepRange(0, 0.6)), 50) == [("windowed", 30), ("windowed-unguided", 20)]
