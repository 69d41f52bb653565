"""A bundle's runs: the sampler's evaluations, with the phases that they are in, less what the bundle leaves out."""

from __future__ import annotations

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
        full_run: whether every evaluation is computed, whatever the bundle would forecast.

    Raises:
        InputError: the sampler's steps cannot be forecast, or what `SamplerTable.schedule` refuses.
    """
    schedule = table.schedule(steps, strength=strength, eta=eta)
    plan = PhasePlan(manifest.rule, schedule.steps)
    if manifest.forecast is not None and not full_run:
        schedule = forecast_schedule(schedule, manifest.forecast)
    return schedule, plan
