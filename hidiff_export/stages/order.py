"""The stages in their order, and the manifest that lists what they made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hidiff_export.signature import controlnet_inputs, controlnet_outputs, phase_inputs, phase_outputs
from hidiff_export.stages import Stage, StageContext
from hidiff_export.stages.engines import Engines, builder_for
from hidiff_export.stages.graphs import Graphs
from hidiff_export.stages.reference import Reference
from hidiff_export.stages.samplers import FOLDER, Samplers
from hidiff_export.stages.weights import CONFIG, WEIGHTS, Weights
from hidiff_export.versions import tool_versions
from hidiff_runtime.manifest import FileRecord, GraphRecord, Manifest, PhaseRecord
from hidiff_runtime.phases import Phase
from hidiff_runtime.sampler import SamplerTable

# The reference comes last: it takes longest, and whatever else is wrong shows before it.
STAGES: tuple[Stage, ...] = (Weights(), Samplers(), Graphs(), Engines(), Reference())


def assemble_manifest(context: StageContext, files: Mapping[str, FileRecord]) -> Manifest:
    """The manifest of a finished build.

    Args:
        context: the build.
        files: every file the stages wrote, by path relative to the bundle.
    """
    recipe = context.recipe
    samplers = {name.value: f"{FOLDER}/{name.value}.safetensors" for name in recipe.sampler}
    stores = {context.unet.name: f"{context.unet.name}/{WEIGHTS}"}
    if recipe.controlnet is not None:
        stores[context.controlnet.name] = f"{context.controlnet.name}/{WEIGHTS}"
    return Manifest(
        tools=tool_versions(),
        recipe=recipe.to_dict(),
        family=recipe.family.value,
        task=recipe.task.value,
        width=recipe.width,
        height=recipe.height,
        batch=recipe.batch,
        guidance=recipe.guidance,
        precision=recipe.precision.value,
        rule=context.rule,
        latent=recipe.latent_shape,
        windowed_blocks=recipe.unet_layout.windowed_blocks,
        phases=tuple(_phase_record(context, phase) for phase in context.phases),
        samplers=samplers,
        default_sampler=recipe.sampler[0].value,
        steps=_tabulated(context.folder, samplers),
        weights=stores,
        controlnet=None if recipe.controlnet is None else _controlnet_record(context),
        files=files,
        reference=next(path for path in files if path.startswith("reference/") and path.endswith(".json")),
        fingerprints={
            "recipe": recipe.fingerprint(),
            "weights": files[stores[context.unet.name]].sha256,
            **({} if recipe.controlnet is None else {"controlnet": files[stores[context.controlnet.name]].sha256}),
        },
    )


def _phase_record(context: StageContext, phase: Phase) -> PhaseRecord:
    recipe = context.recipe
    config = json.loads((context.unet / CONFIG).read_text(encoding="utf-8"))
    size = (recipe.latent_height, recipe.latent_width)
    graph = context.graph(phase)
    return PhaseRecord(
        phase=phase,
        graph=graph.relative_to(context.folder).as_posix(),
        engines=_engines(context, graph),
        inputs=phase_inputs(config, recipe.unet_layout, phase, *size, recipe.model_batch),
        outputs=phase_outputs(config, *size, recipe.model_batch),
    )


def _controlnet_record(context: StageContext) -> GraphRecord:
    recipe = context.recipe
    config = json.loads((context.controlnet / CONFIG).read_text(encoding="utf-8"))
    shape = (recipe.latent_height, recipe.latent_width, recipe.model_batch)
    return GraphRecord(
        graph=context.controlnet_graph.relative_to(context.folder).as_posix(),
        engines=_engines(context, context.controlnet_graph),
        inputs=controlnet_inputs(config, *shape),
        outputs=controlnet_outputs(config, *shape),
    )


def _engines(context: StageContext, graph: Path) -> dict[str, str]:
    builder = builder_for(context)
    return {builder.name: builder.engine_path(graph).relative_to(context.folder).as_posix()}


def _tabulated(folder: Path, samplers: Mapping[str, str]) -> tuple[int, ...]:
    """The step counts that every table holds; a scheduler need not run with all that were asked for."""
    tables = [set(SamplerTable.read(folder / path).steps.tolist()) for path in samplers.values()]
    return tuple(sorted(set.intersection(*tables)))
