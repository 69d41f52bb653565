"""A bundle's runs: the sampler's evaluations, with the phases that they are in, less what the bundle leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hidiff_runtime.phases import PhasePlan
from hidiff_runtime.sampling.forecast import forecast_schedule

if TYPE_CHECKING:
    from hidiff_runtime.format.manifest import Manifest
    from hidiff_runtime.sampling.scheduler_state import Schedule
    from hidiff_runtime.sampling.scheduler_table import SamplerTable


def planned_schedule(
    manifest: Manifest,
    table: SamplerTable,
    steps: int,
    *,
    strength: float | None = None,
    eta: float = 0.0,
    full_run: bool = False,
) -> tuple[Schedule, PhasePlan]:
    """Returns a run's evaluations and phases.

    Args:
        manifest: of the bundle.
        table: of one of its samplers.
        steps: as for `SamplerTable.schedule`, and so are ``strength`` and ``eta``.
        full_run: whether every evaluation is computed, guided and of all layers, whatever the bundle would leave out.

    Raises:
        InputError: the sampler's steps cannot be forecast, or what `SamplerTable.schedule` refuses.
    """
    schedule = table.schedule(steps, strength=strength, eta=eta)
    plan = PhasePlan(manifest.rule.whole if full_run else manifest.rule, schedule.steps)
    if manifest.forecast is not None and not full_run:
        schedule = forecast_schedule(schedule, manifest.forecast)
    return _reusing(schedule, plan), plan


def _reusing(schedule: Schedule, plan: PhasePlan) -> Schedule:
    """Returns the run with the evaluations marked that take the deep features of one before."""
    if plan.rule.reuse is None:
        return schedule
    phases = [plan.phase_at(evaluation.step) for evaluation in schedule.evaluations]
    shallow = plan.rule.reuse.shallow(phases, [evaluation.computed for evaluation in schedule.evaluations])
    marked = zip(schedule.evaluations, shallow, strict=True)
    return replace(schedule, evaluations=tuple(replace(one, shallow=taken) for one, taken in marked))
