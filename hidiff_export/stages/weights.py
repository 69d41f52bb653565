"""The checkpoint becomes a weight store in the recipe's precision, with the configuration of its networks beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hidiff_export.bundle import write_json
from hidiff_export.graph.weights import WeightStore
from hidiff_export.model.component import Component
from hidiff_export.model.load import load_unet
from hidiff_export.model.sources import find_scheduler_config, source_fingerprint
from hidiff_export.stages import Report, StageContext

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


class Weights:
    """``unet/weights.safetensors``, ``unet/config.json`` and the scheduler's configuration."""

    name = "weights"
    title = "weights"
    needs = ()

    def inputs(self, context: StageContext) -> Any:
        """The checkpoint by its content, not its path, and the precision it is rounded to."""
        recipe = context.recipe
        return {
            "source": source_fingerprint(recipe.source, Component.UNET),
            "family": recipe.family.value,
            "task": recipe.task.value,
            "width": recipe.unet_width.value,
            "precision": recipe.precision.value,
        }

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Reads, rounds and writes the tensors one by one."""
        recipe = context.recipe
        checkpoint = load_unet(recipe.source, recipe.family, recipe.task, recipe.unet_width)
        context.unet.mkdir(parents=True, exist_ok=True)
        config, weights = context.unet / CONFIG, context.unet / WEIGHTS
        scheduler = context.folder / SCHEDULER_CONFIG
        scheduler.parent.mkdir(exist_ok=True)
        write_json(config, {"_class_name": "UNet2DConditionModel", **checkpoint.config})
        write_json(scheduler, find_scheduler_config(recipe.source, recipe.family))
        WeightStore.write(checkpoint.state_dict, weights, recipe.precision, lambda done, total: report(done, total, ""))
        return config, weights, scheduler
