"""Sampler tables beside the diffusers schedulers that they were made from; a build keeps what these answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hidiff_export.errors import ParityError
from hidiff_export.recipe import Recipe
from hidiff_export.reference.tolerances import Boundary
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler
from hidiff_export.scheduler_tables.reference_answers import ask, shown
from hidiff_runtime.sampling.scheduler_table import SamplerTable
from hidiff_runtime.sampling.table_rows import Rows
from hidiff_runtime.verification.comparison import Verdict
from hidiff_runtime.verification.replay_schedulers import replay_sampler
from hidiff_runtime.verification.sample_recorder import SampleRecorder
from hidiff_runtime.verification.scheduler_samples import SamplerAnswers, SamplerSample


def record_samplers(
    recorder: SampleRecorder, recipe: Recipe, config: Mapping[str, Any], tables: Mapping[str, SamplerTable]
) -> None:
    """Records what the schedulers of these tables answer, once the tables are seen to agree.

    Args:
        recorder: of the bundle's samples.
        recipe: of the bundle.
        config: of the checkpoint's noise schedule.
        tables: by the samplers' names.

    Raises:
        ParityError: a table is not what its scheduler does.
    """
    for name, table in tables.items():
        sample, answers = _asked(name, recipe, config, table.rows)
        verdict = replay_sampler(table, sample, answers)
        if not verdict.ok:
            raise ParityError(
                f"The table of the sampler {name} is not what its diffusers scheduler does.",
                given=verdict.fault,
                advice="Build the bundle again; if that does not help, choose another sampler.",
            )
        tensors: dict[str, Any] = {key: recorder.keep(array) for key, array in vars(answers).items()}
        recorder.samplers.append(replace(sample, **tensors))


def compare_samplers(
    recipe: Recipe, config: Mapping[str, Any], tables: Mapping[str, SamplerTable]
) -> Iterator[Verdict]:
    """Yields a verdict on each table, beside its scheduler as it is now; arguments as for `record_samplers`."""
    for name, table in tables.items():
        verdict = replay_sampler(table, *_asked(name, recipe, config, table.rows))
        yield replace(verdict, boundary=Boundary.SAMPLER.value)


def _asked(name: str, recipe: Recipe, config: Mapping[str, Any], rows: Rows) -> tuple[SamplerSample, SamplerAnswers]:
    """Returns a scheduler's answers, and a sample that says all of it but in which tensors they are."""
    scheduler = build_scheduler(name, config, timesteps=recipe.timesteps, tcd_eta=recipe.tcd_eta)
    eta = recipe.tcd_eta if name == "tcd" else None
    return SamplerSample(name, scheduler.order, eta, rows.depth), ask(scheduler, recipe.steps, shown(rows))
