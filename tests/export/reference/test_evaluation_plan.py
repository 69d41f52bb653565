from dataclasses import replace

import pytest

from hidiff_export.families.family import Family, Task
from hidiff_export.families.hidiffusion_rules import phase_rule
from hidiff_export.reference.evaluation_plan import RunSchedule, edge_points, fullest, keeps_samples, recorded
from hidiff_runtime.phases import PhaseRule, StepRange
from hidiff_runtime.reused_features import Reuse

CASES = [
    (Family.SD15, Task.TEXT_TO_IMAGE, 1024),
    (Family.SD15, Task.TEXT_TO_IMAGE, 2048),
    (Family.SDXL, Task.TEXT_TO_IMAGE, 2048),
    (Family.SDXL, Task.TEXT_TO_IMAGE, 4096),
    (Family.SDXL, Task.INPAINTING, 2048),
    (Family.SDXL_TURBO, Task.TEXT_TO_IMAGE, 1024),
    (Family.SDXL, Task.CONTROLNET, 2048),
    (Family.SDXL, Task.CONTROLNET, 4096),
    (Family.SDXL, Task.CONTROLNET_IMAGE_TO_IMAGE, 2048),
]


def course(rule: PhaseRule, steps: int, order: int = 1) -> RunSchedule:
    evaluations = steps * order - (order - 1)
    return RunSchedule(rule, steps, tuple(float(999 - index) for index in range(evaluations)), order)


def courses(rule: PhaseRule) -> list[RunSchedule]:
    return [course(rule, steps) for steps in range(1, 101)]


def names(course: RunSchedule) -> list[str]:
    return [point.phase.name for point in course.points]


def test_the_run_for_sd15_at_1024_is_three_steps() -> None:
    chosen = fullest(courses(phase_rule(Family.SD15, Task.TEXT_TO_IMAGE, 1024, 1024)))

    assert chosen is not None
    assert names(chosen) == ["strided", "windowed", "windowed"]


def test_sdxl_at_2048_needs_seven_steps_for_all_its_changes() -> None:
    chosen = fullest(courses(phase_rule(Family.SDXL, Task.TEXT_TO_IMAGE, 2048, 2048)))

    assert chosen is not None
    assert names(chosen) == ["strided", "pooled", *["windowed"] * 5]


def test_a_build_records_four_evaluations_at_most_unless_they_cost_next_to_nothing() -> None:
    runs = courses(phase_rule(Family.SDXL, Task.TEXT_TO_IMAGE, 2048, 2048))

    dear = recorded(runs, lambda _phase: 60e12)
    cheap = recorded(runs, lambda _phase: 1e9)

    assert dear is not None
    assert names(dear) == ["pooled", "windowed", "windowed"]
    assert cheap == fullest(runs)


def test_a_build_without_short_step_counts_records_no_run() -> None:
    rule = phase_rule(Family.SD15, Task.TEXT_TO_IMAGE, 1024, 1024)

    assert recorded([course(rule, 50)], lambda _phase: 5e12) is None


@pytest.mark.parametrize(("family", "task", "size"), CASES)
def test_random_inputs_and_the_recorded_run_reach_every_phase_and_both_sides_of_every_change(
    family: Family, task: Task, size: int
) -> None:
    rule = phase_rule(family, task, size, size)
    runs = courses(rule)
    run = recorded(runs, lambda _phase: 60e12)
    assert run is not None

    points = edge_points(rule, runs, run)

    whole = fullest(runs)
    assert whole is not None
    assert {point.phase for point in points} | run.phases == set(rule.phases())
    for before, after in whole.edges:
        assert (before.phase, after.phase) in run.changes or {before, after} <= set(points)
    assert len(points) + len(run.points) <= 8


@pytest.mark.parametrize(("family", "task", "size"), CASES)
def test_points_are_in_the_phase_that_the_rule_gives_their_step(family: Family, task: Task, size: int) -> None:
    rule = phase_rule(family, task, size, size)

    for point in edge_points(rule, courses(rule)):
        assert rule.phase_at(point.step, point.steps) == point.phase
        assert 0 <= point.timestep <= 999


def test_a_phase_that_only_long_runs_reach_is_not_forgotten() -> None:
    rule = PhaseRule(strided=StepRange(0, 0.004))

    points = edge_points(rule, courses(rule))

    assert {point.phase.name for point in points} == {"strided", "windowed"}


def test_a_second_order_sampler_stays_in_a_phase_for_both_evaluations_of_a_step() -> None:
    heun = course(PhaseRule(pooled=StepRange(0, 0.5)), 4, order=2)

    assert heun.logical_steps == 4
    assert names(heun) == [*["pooled"] * 4, *["windowed"] * 3]
    assert [point.step for point in heun.points] == [0, 0, 1, 1, 2, 2, 3]


def test_a_run_that_leaves_work_out_is_recorded_and_every_graph_has_a_sample() -> None:
    """At full size, where the other changes of the run cost too much to be computed twice."""
    plain = phase_rule(Family.SD15, Task.TEXT_TO_IMAGE, 1024, 1024)
    rule = replace(plain, guidance=StepRange(0, 0.6), reuse=Reuse(3))
    runs = courses(rule)
    chosen = recorded(runs, lambda _phase: 60e12)
    assert chosen is not None
    assert all(chosen.leaves_out[1:])
    assert names(chosen) == ["strided", "windowed", "windowed-shallow", "windowed-unguided"]
    points = edge_points(rule, runs, chosen)
    kept = {point.phase for point in chosen.points if keeps_samples(point.phase)}
    assert kept | {point.phase for point in points} == {*rule.phases()}
    assert not kept & {point.phase for point in points}
    assert all(rule.phase_at(point.step, point.steps) == replace(point.phase, shallow=False) for point in points)


def test_samples_of_residuals_for_the_prompts_alone_are_taken_on_random_inputs() -> None:
    plain = phase_rule(Family.SDXL, Task.CONTROLNET, 1024, 1024)
    rule = replace(plain, guidance=StepRange(0, 0.3))
    runs = courses(rule)
    chosen = fullest(runs)
    points = {point.phase.name for point in edge_points(rule, runs, chosen)}
    assert {phase.name for phase in rule.phases() if phase.control and phase.unguided} <= points
