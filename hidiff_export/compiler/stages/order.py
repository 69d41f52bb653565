"""The stages in their order, and the manifest that lists what they made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.lora import lora_fingerprint
from hidiff_export.checkpoints.stored_configs import WEIGHTS
from hidiff_export.compiler.graph_specs import bare_manifest, step_records
from hidiff_export.compiler.stages.engines import EnginesStage, with_engines
from hidiff_export.compiler.stages.graphs import GraphsStage
from hidiff_export.compiler.stages.quantization import QuantizationStage
from hidiff_export.compiler.stages.reference import ReferenceStage
from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage, sampler_tables
from hidiff_export.compiler.stages.stage import Report, Stage, StageContext
from hidiff_export.compiler.stages.timing_graph import TimingGraphStage, is_timed, timing_record
from hidiff_export.compiler.stages.weights import WeightsStage, model_index
from hidiff_export.errors import ExportError
from hidiff_export.recipe import Recipe
from hidiff_export.tool_versions import tool_versions
from hidiff_runtime.format.manifest import Contents, FileDigest, Manifest
from hidiff_runtime.verification.reference_samples import INDEX

# The reference comes last: it takes longest, and whatever else is wrong shows before it.
STAGES: tuple[Stage, ...] = (WeightsStage(), SchedulerTablesStage(), GraphsStage(), EnginesStage(), ReferenceStage())
QUANTIZED_STAGES: tuple[Stage, ...] = (
    WeightsStage(),
    SchedulerTablesStage(),
    GraphsStage(),
    ReferenceStage(),
    QuantizationStage(),
    EnginesStage(QuantizationStage.name),
)
"""Those of a quantized recipe: ranges are measured on what the reference was given."""


_MAKING_GRAPHS = (GraphsStage.name, QuantizationStage.name)

SHARED = (WeightsStage.name, SchedulerTablesStage.name, TimingGraphStage.name)
"""Names of the stages that a build runs once for all buckets."""


class BucketStage(Stage):
    """A stage for one of the buckets after the first.

    Args:
        stage: that is run for it.
        index: of the bucket.
        suffix: that its files' names end with.
        shared: what runs in the place of the stages of all buckets, if something does.
    """

    def __init__(self, stage: Stage, index: int, suffix: str, shared: str = "") -> None:
        self.stage = stage
        self.index = index
        self.name = f"{stage.name}{suffix}"
        self.title = f"{stage.title}, {suffix.removeprefix('-')}"
        needs = (shared or name if name in SHARED else f"{name}{suffix}" for name in stage.needs)
        self.needs = tuple(dict.fromkeys(needs))

    @property
    def module(self) -> str:
        """That of the stage that is run."""
        return self.stage.module

    def inputs(self, context: StageContext) -> Any:
        """Returns what the stage depends on for this bucket."""
        return self.stage.inputs(context.buckets[self.index])

    def run(self, context: StageContext, report: Report) -> tuple[Path, ...]:
        """Does the stage's work for this bucket."""
        return self.stage.run(context.buckets[self.index], report)


def stages_of(recipe: Recipe, others: Mapping[str, Stage] | None = None) -> tuple[Stage, ...]:
    """Returns the stages that a recipe takes: the first bucket's, then those of each other one.

    Args:
        recipe: what is built.
        others: stages to take in the place of those of their names.
    """
    stages = _one_bucket(recipe, others)
    contexts = StageContext.of(recipe, Path()).buckets
    further = (_bucket_stages(stages, index, context.suffix) for index, context in enumerate(contexts) if index)
    return (*stages, *itertools.chain.from_iterable(further))


def added_stages(recipe: Recipe, index: int, shared: Stage, *, force_zeros: bool) -> tuple[Stage, ...]:
    """Returns the stages of a bucket that comes to a finished bundle, from which alone they read.

    Args:
        recipe: of all buckets.
        index: of the new one.
        shared: puts what is there into the working folder.
        force_zeros: the manifest's ``force_zeros_for_empty_prompt``.
    """
    stages = _one_bucket(recipe, {ReferenceStage.name: ReferenceStage(force_zeros)})
    suffix = StageContext.of(recipe, Path()).buckets[index].suffix
    return (shared, *_bucket_stages(stages, index, suffix, shared.name))


def _one_bucket(recipe: Recipe, others: Mapping[str, Stage] | None) -> tuple[Stage, ...]:
    usual = QUANTIZED_STAGES if recipe.precision.quantized else STAGES
    if is_timed(recipe):
        usual = _with_timing_graph(usual)
    return tuple((others or {}).get(stage.name, stage) for stage in usual)


def _with_timing_graph(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Returns the stages with that of the timing graph before the engines', which then needs it."""
    place = next(index for index, stage in enumerate(stages) if stage.name == EnginesStage.name)
    graphs = next(stage.name for stage in reversed(stages[:place]) if stage.name in _MAKING_GRAPHS)
    further = (name for name in stages[place].needs if name not in EnginesStage().needs)
    timing = TimingGraphStage(graphs)
    return (*stages[:place], timing, EnginesStage(*further, timing.name), *stages[place + 1 :])


def _bucket_stages(stages: Sequence[Stage], index: int, suffix: str, shared: str = "") -> tuple[Stage, ...]:
    """Returns the stages of a bucket after the first; for the arguments see `BucketStage`."""
    return tuple(BucketStage(stage, index, suffix, shared) for stage in stages if stage.name not in SHARED)


def check_order(stages: Sequence[Stage]) -> None:
    """Checks that every stage comes once, and after those whose results it needs.

    Raises:
        ExportError: one does not; whoever put the stages together is wrong, not the recipe.
    """
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        if stage.name in names[:index]:
            raise _wrong_order(f"two stages are called {stage.name}", names)
        for needed in stage.needs:
            if needed not in names:
                raise _wrong_order(f"{stage.name} needs {needed}, which is not among them", names)
            if needed not in names[:index]:
                raise _wrong_order(f"{stage.name} needs {needed}, which does not come before it", names)


def _wrong_order(fault: str, names: Sequence[str]) -> ExportError:
    return ExportError(
        "The stages of the build cannot run in the order that they were put together in.",
        given=f"{', '.join(names)}: {fault}",
        advice="Put each stage once, after those that its needs name, as hidiff_export.compiler.stages.order does.",
    )


def assemble_contents(recipe: Recipe, context: StageContext, files: Mapping[str, FileDigest]) -> Contents:
    """Returns the manifest of a finished build.

    Args:
        recipe: of all buckets.
        context: of one of them.
        files: every file the stages wrote, by path relative to the bundle.
    """
    force_zeros = model_index(recipe).force_zeros_for_empty_prompt
    first, *others = (bucket_manifest(bucket, files, force_zeros=force_zeros) for bucket in context.buckets)
    fingerprints = {
        "recipe": recipe.fingerprint(),
        "weights": files[first.weights["unet"]].sha256,
        **{name: files[path].sha256 for name, path in first.weights.items() if name != "unet"},
        **{f"lora.{index}": lora_fingerprint(Path(lora.path)) for index, lora in enumerate(recipe.lora)},
    }
    return Contents.of([replace(first, recipe=recipe.to_dict(), fingerprints=fingerprints), *others])


def bucket_manifest(context: StageContext, files: Mapping[str, FileDigest], *, force_zeros: bool) -> Manifest:
    """Returns what the manifest of a finished build says of one bucket, without fingerprints, which are the bundle's.

    Args:
        context: of the bucket.
        files: every file the stages wrote, by path relative to the bundle.
        force_zeros: the manifest's ``force_zeros_for_empty_prompt``, which the checkpoint says.
    """
    recipe = context.recipe
    bare = bare_manifest(context, sampler_tables(context), force_zeros)
    vae, timing = bare.vae, timing_record(context)
    step, *unguided_step = (with_engines(context, record) for record in step_records(context))
    controls = (bare.controlnet, bare.unguided_controlnet)
    controlnet, unguided_controlnet = (None if one is None else with_engines(context, one) for one in controls)
    networks = ("unet", "controlnet", *recipe.text_encoders, "vae")
    stores = {name: path for name in networks if (path := f"{name}/{WEIGHTS}") in files}
    return replace(
        bare,
        tools=tool_versions(),
        recipe=recipe.to_dict(),
        phases=tuple(with_engines(context, record) for record in bare.phases),
        weights=stores,
        controlnet=controlnet,
        unguided_controlnet=unguided_controlnet,
        step=step,
        unguided_step=unguided_step[0] if unguided_step else None,
        timing=None if timing is None else with_engines(context, timing),
        text_encoders=tuple(with_engines(context, record) for record in bare.text_encoders),
        vae=None
        if vae is None
        else replace(vae, decoder=with_engines(context, vae.decoder), encoder=with_engines(context, vae.encoder)),
        files=files,
        reference=context.inside(context.reference / INDEX),
    )
