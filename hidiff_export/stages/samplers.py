"""Noise schedulers become tables: the real diffusers scheduler is probed for every number of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hidiff_export.sampler.probe import probe
from hidiff_export.stages import Report, StageContext
from hidiff_export.stages.weights import SCHEDULER_CONFIG

FOLDER = "samplers"


class Samplers:
    """One table a sampler of the recipe, in ``samplers/``."""

    name = "samplers"
    title = "sampler tables"
    needs = ("weights",)

    def inputs(self, context: StageContext) -> Any:
        """The samplers and the numbers of steps; the noise schedule comes with the weights."""
        return {"samplers": [name.value for name in context.recipe.sampler], "steps": list(context.recipe.steps)}

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Probes each sampler in turn."""
        folder = context.folder / FOLDER
        folder.mkdir(exist_ok=True)
        config = json.loads((context.folder / SCHEDULER_CONFIG).read_text(encoding="utf-8"))
        written = []
        for index, sampler in enumerate(context.recipe.sampler):
            report(index, len(context.recipe.sampler), sampler.value)
            path = folder / f"{sampler.value}.safetensors"
            probe(sampler.value, config, context.recipe.steps).write(path)
            written.append(path)
        return tuple(written)
