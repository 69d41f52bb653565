"""Noise schedulers become tables: the real diffusers scheduler is probed for every number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.stored_configs import SCHEDULER_CONFIG, read_config
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.recipe import Recipe
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.sampling.scheduler_table import SamplerTable

FOLDER = "samplers"


class SchedulerTablesStage(Stage):
    """One table a sampler of the recipe, in ``samplers/``."""

    name = "samplers"
    title = "sampler tables"
    needs = ("weights",)

    def inputs(self, context: StageContext) -> Any:
        """Returns the samplers and what their runs are laid out by; the noise schedule comes with the weights."""
        return tabulated(context.recipe)

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Probes each sampler in turn."""
        folder = context.folder / FOLDER
        folder.mkdir(exist_ok=True)
        config = read_config(context.folder / SCHEDULER_CONFIG)
        written = []
        for index, sampler in enumerate(context.recipe.sampler):
            report(index, len(context.recipe.sampler), sampler.value)
            path = table_path(context, sampler.value)
            recipe = context.recipe
            table = probe(sampler.value, config, recipe.steps, timesteps=recipe.timesteps, tcd_eta=recipe.tcd_eta)
            table.write(path)
            written.append(path)
        return tuple(written)


def table_path(context: StageContext, sampler: str) -> Path:
    """Returns the table of a sampler."""
    return context.folder / FOLDER / f"{sampler}.safetensors"


def sampler_tables(context: StageContext) -> dict[str, SamplerTable]:
    """Returns the recipe's tables by name, as they were written."""
    return {name.value: SamplerTable.read(table_path(context, name.value)) for name in context.recipe.sampler}


def tabulated(recipe: Recipe) -> dict[str, Any]:
    """Returns what sampler tables depend on beside the noise schedule, as JSON."""
    return {
        "samplers": [name.value for name in recipe.sampler],
        "steps": list(recipe.steps),
        "timesteps": None if recipe.timesteps is None else list(recipe.timesteps),
        "tcd_eta": recipe.tcd_eta,
    }
