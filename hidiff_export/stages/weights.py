"""The checkpoint becomes a weight store in the recipe's precision, with the configuration of its networks beside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hidiff_export.bundle import write_json
from hidiff_export.graph.islands import precision_of
from hidiff_export.graph.weights import WeightStore
from hidiff_export.model.component import Component
from hidiff_export.model.load import load_controlnet, load_unet
from hidiff_export.model.sources import find_scheduler_config, source_fingerprint
from hidiff_export.stages import Report, StageContext

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"


class Weights:
    """``weights.safetensors`` and ``config.json`` of the UNet and the ControlNet, and the scheduler's configuration."""

    name = "weights"
    title = "weights"
    needs = ()

    def inputs(self, context: StageContext) -> Any:
        """The checkpoint by its content, not its path, and the precision it is rounded to."""
        recipe = context.recipe
        return {
            "source": source_fingerprint(recipe.source, Component.UNET),
            "controlnet": recipe.controlnet and source_fingerprint(recipe.controlnet, Component.CONTROLNET),
            "family": recipe.family.value,
            "task": recipe.task.value,
            "width": recipe.unet_width.value,
            "precision": recipe.precision.stored.value,
        }

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Reads, rounds and writes the tensors one by one."""
        recipe = context.recipe
        networks = {Component.UNET: load_unet(recipe.source, recipe.family, recipe.task, recipe.unet_width)}
        if recipe.controlnet is not None:
            networks[Component.CONTROLNET] = load_controlnet(recipe.controlnet, recipe.family, recipe.unet_width)
        scheduler = context.folder / SCHEDULER_CONFIG
        scheduler.parent.mkdir(parents=True, exist_ok=True)
        write_json(scheduler, find_scheduler_config(recipe.source, recipe.family))
        written = [scheduler]
        for component, checkpoint in networks.items():
            folder = context.folder / component.value
            folder.mkdir(exist_ok=True)
            progress = partial(_show, report, component.value)
            write_json(folder / CONFIG, {"_class_name": component.class_name, **checkpoint.config})
            precision = precision_of(component.value, recipe.precision)
            WeightStore.write(checkpoint.state_dict, folder / WEIGHTS, precision, progress)
            written += [folder / CONFIG, folder / WEIGHTS]
        return tuple(written)


def _show(report: Report, network: str, done: int, total: int) -> None:
    report(done, total, network)
