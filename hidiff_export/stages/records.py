"""What goes in and out of every graph of a build, by the recipe: what engines are checked against and manifests say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hidiff_export.signature import controlnet_inputs, controlnet_outputs, phase_inputs, phase_outputs
from hidiff_export.stages import StageContext
from hidiff_export.stages.samplers import FOLDER
from hidiff_export.stages.weights import CONFIG
from hidiff_runtime.manifest import GraphRecord, PhaseRecord
from hidiff_runtime.phases import Phase
from hidiff_runtime.safetensors import SafetensorsFile
from hidiff_runtime.sampler import STATE
from hidiff_runtime.step_graph import LATENTS, step_inputs, step_outputs


def phase_record(context: StageContext, phase: Phase) -> PhaseRecord:
    """The record of a phase's graph, without engines."""
    recipe = context.recipe
    config = _config(context.unet)
    size = (recipe.latent_height, recipe.latent_width)
    return PhaseRecord(
        phase=phase,
        graph=_inside(context, context.graph(phase)),
        engines={},
        inputs=phase_inputs(config, recipe.unet_layout, phase, *size, recipe.model_batch),
        outputs=phase_outputs(config, *size, recipe.model_batch),
    )


def controlnet_record(context: StageContext) -> GraphRecord | None:
    """The record of the ControlNet's graph, without engines; None where the recipe names no ControlNet."""
    recipe = context.recipe
    if recipe.controlnet is None:
        return None
    config = _config(context.controlnet)
    shape = (recipe.latent_height, recipe.latent_width, recipe.model_batch)
    return GraphRecord(
        graph=_inside(context, context.controlnet_graph),
        engines={},
        inputs=controlnet_inputs(config, *shape),
        outputs=controlnet_outputs(config, *shape),
    )


def step_record(context: StageContext) -> GraphRecord:
    """The record of the step graph, without engines."""
    phase = phase_record(context, context.phases[0])
    latents = next(spec for spec in phase.inputs if spec.name == LATENTS)
    due = (context.recipe.batch, phase.outputs[0], latents, states(context))
    return GraphRecord(_inside(context, context.step_graph), {}, step_inputs(*due), step_outputs(*due))


def states(context: StageContext) -> int:
    """How many states the recipe's samplers need at most, and 1 at least, by the tables that are there already."""
    needed = [1]
    for sampler in context.recipe.sampler:
        with SafetensorsFile.open(context.folder / FOLDER / f"{sampler.value}.safetensors") as table:
            needed.append(table.info("rows").shape[-1] - STATE)
    return max(needed)


def graph_records(context: StageContext) -> tuple[GraphRecord, ...]:
    """The records of every graph that engines are built from: the phases' in running order, then the others'."""
    others = (controlnet_record(context), step_record(context))
    phases = (phase_record(context, phase) for phase in context.phases)
    return (*phases, *(record for record in others if record is not None))


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def _inside(context: StageContext, path: Path) -> str:
    return path.relative_to(context.folder).as_posix()
