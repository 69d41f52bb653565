"""A bundle of another checkpoint of the same family: new weights under the graphs that are there, without tracing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hidiff_export.checkpoints.stored_configs import CONFIG, read_config
from hidiff_export.compiler.compile import BuildProgress, BuildResult, build
from hidiff_export.compiler.workspace import Workspace
from hidiff_export.errors import CheckpointError, InputError
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.bundle_folder import BundleFolder, LinksOption
from hidiff_runtime.format.manifest import Manifest
from hidiff_runtime.phases import Phase

_GRAPH_DEPENDS_ON = {"text_encoder_2": ("eos_token_id",)}
"""What a checkpoint is free to set, and a graph holds all the same."""


_ORIGIN = "the bundle's recipe with what was changed"

_TRACED_WITH = (
    "family",
    "unet_width",
    "task",
    "width",
    "height",
    "batch",
    "guidance",
    "precision",
    "text",
    "prompt_chunks",
    "vae",
    "tiles",
    "unet_layout",
)
"""What graphs depend on, beside the phases there are."""


def rebased_recipe(
    manifest: Manifest, changes: Mapping[str, Any], overrides: Iterable[str] = ()
) -> tuple[Recipe, tuple[str, ...]]:
    """Returns a bundle's recipe with another ``source``, ``controlnet`` or ``lora``, and notices of what was left.

    What is not named stays, but for the noise schedule's words where the new source says something of its own.

    Args:
        manifest: of the bundle.
        changes: values by the recipe's keys.
        overrides: ``KEY=VALUE`` texts, as for `Recipe.load`.

    Raises:
        CheckpointError: a file contradicts itself, or is damaged.
        InputError: a ControlNet is named for a bundle that has none, or a value is one that graphs are traced with.
        RecipeError: a value is not valid, for example a pickle.
    """
    if "controlnet" in changes and manifest.controlnet is None:
        raise InputError(
            "The bundle has no ControlNet that another could take the place of.",
            given=changes["controlnet"],
            advice="Build a bundle with this ControlNet: hidiff-export build RECIPE --set controlnet=SOURCE.",
        )
    # A bundle from before there were text encoders and VAEs in bundles says nothing of them, and has none.
    holds = {"text": bool(manifest.text_encoders), "vae": manifest.vae is not None}
    before = {**holds, **manifest.recipe}
    kept = {**before, **changes}
    notices: tuple[str, ...] = ()
    texts = tuple(overrides)
    recipe = Recipe.from_dict(kept, _ORIGIN, texts)
    if recipe.source != before["source"]:
        kept, notices = _with_own_schedule(kept, texts)
        recipe = Recipe.from_dict(kept, _ORIGIN, texts)
    _check_graphs_stay(manifest, Recipe.from_dict(before, _ORIGIN), recipe)
    return recipe, notices


def _with_own_schedule(values: Mapping[str, Any], overrides: tuple[str, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the values without the words of the noise schedule that the new source has its own of."""
    from hidiff_export.scheduler_tables.noise_schedule import RECIPE_KEYS, checkpoint_schedule

    bare = {key: value for key, value in values.items() if key not in RECIPE_KEYS}
    new = Recipe.from_dict(bare, _ORIGIN, overrides)
    declared = checkpoint_schedule(new).declared
    left = {key: values[key] for key in RECIPE_KEYS if key in values and RECIPE_KEYS[key] in declared}
    notices = tuple(
        f"{key} {value} of the old bundle's recipe is left: {new.source} has its own noise schedule. "
        f"--set {key}={value} keeps it."
        for key, value in left.items()
        if getattr(new, key) is None
    )
    return {key: value for key, value in values.items() if key not in left}, notices


def _check_graphs_stay(manifest: Manifest, before: Recipe, after: Recipe) -> None:
    """Refuses values that graphs are traced with. Raises InputError."""
    changed = [key for key in _TRACED_WITH if getattr(before, key) != getattr(after, key)]
    if (before.controlnet is None) != (after.controlnet is None):
        changed.append("controlnet")
    phases = after.phase_rule().phases()
    if missing := set(phases) - {record.phase for record in manifest.phases}:
        changed.append(_brings_phases(before, missing))
    if any(before.depth_of(phase) != after.depth_of(phase) for phase in phases):
        changed.append("reuse")
    if changed:
        key = {"tiles": "vae_tile", "unet_layout": "hidiffusion"}.get(changed[0], changed[0])
        old, new = (recipe.to_dict().get(key) for recipe in (before, after))
        raise InputError(
            f"A rebased bundle keeps its graphs, which were traced for another {key}.",
            given=f"{key} {new}, and {old} in the bundle",
            advice=f"Leave {key} as it is, or make the bundle with hidiff-export build.",
        )


def _brings_phases(before: Recipe, missing: Iterable[Phase]) -> str:
    """Returns the recipe's key that graphs are missing for."""
    if before.guidance_until is None and all(phase.unguided for phase in missing):
        return "guidance_until"
    return "reuse" if before.reuse is None and all(phase.shallow for phase in missing) else "hidiffusion"


def rebase(
    folder: Path,
    output: Path,
    display: BuildProgress,
    *,
    changes: Mapping[str, Any],
    overrides: Iterable[str] = (),
    force: bool = False,
    allow_links: LinksOption = (),
) -> BuildResult:
    """Makes a bundle of other weights with the graphs of the one in ``folder``, which stays as it is.

    Weights, tokenizers and the noise schedule come from the new checkpoint, engines are made from the graphs as a build
    makes them, ranges of quantized layers are measured and the reference is recorded anew. The result is, byte for
    byte, what a build from the new checkpoint gives. An interrupted one goes on when it is called again.

    Args:
        folder: of a finished bundle.
        output: where the new one goes; with ``force`` it may be ``folder`` itself, which is replaced at the end.
        display: shows the stages.
        changes: values of the recipe: ``source``, ``controlnet``, ``lora``.
        overrides: ``KEY=VALUE`` texts that change others, of those that graphs are not traced with.
        force: start over, and replace a finished bundle at ``output``.
        allow_links: folders that links in ``folder`` may lead into, as for :func:`hidiff_runtime.open`.

    Raises:
        HidiffError: of the class that says what failed; a bundle or checkpoint that does not fit is refused before
            anything is written.
    """
    before = BundleFolder(folder.absolute(), allow_links)
    manifest = before.manifest()
    _refuse_itself(folder, output, force=force)
    Workspace(output, force=force).check()
    recipe, notices = rebased_recipe(manifest, changes, overrides)
    # Here, because the stages bring in torch and onnx, which a refused bundle or recipe must not wait for.
    from hidiff_export.compiler.stages.graphs import GraphsStage
    from hidiff_export.compiler.stages.order import stages_of
    from hidiff_export.compiler.stages.reuse import ReusedGraphs, ReusedSchedulerTables, SourceBundle
    from hidiff_export.compiler.stages.scheduler_tables import SchedulerTablesStage
    from hidiff_export.compiler.stages.stage import Stage

    check_checkpoint(before, recipe)
    for notice in notices:
        display.notice(notice)
    origin = SourceBundle(before, manifest)
    taken: dict[str, Stage] = {
        GraphsStage.name: ReusedGraphs(origin),
        SchedulerTablesStage.name: ReusedSchedulerTables(origin),
    }
    result = build(recipe, output, display, force=force, stages=stages_of(recipe, taken))
    return replace(result, notices=(*notices, *result.notices))


def check_checkpoint(folder: BundleFolder, recipe: Recipe) -> None:
    """Looks at everything a checkpoint has to have, without reading weights.

    Raises:
        BundleError: the bundle's configurations cannot be read.
        CheckpointError: it lacks a network or a tokenizer, is of another family, task or width, or a configuration
            differs in what the bundle's graphs were traced with.
    """
    from hidiff_export.compiler.stages.weights import checkpoints, tokenizers

    for component, checkpoint in checkpoints(recipe).items():
        before = read_config(folder.file(f"{component.value}/{CONFIG}"))
        now = {**component.written_as, **checkpoint.config}
        free = component.free_keys - set(_GRAPH_DEPENDS_ON.get(component.value, ()))
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if odd := [key for key in differing if key not in free]:
            raise CheckpointError(
                f"The bundle's graphs were traced with another configuration of the {component.class_name}.",
                given="; ".join(f"{key} {now.get(key)}, in the bundle {before.get(key)}" for key in odd[:4]),
                advice="Build the new checkpoint with hidiff-export build.",
            )
    tokenizers(recipe)


def _refuse_itself(folder: Path, output: Path, *, force: bool) -> None:
    if folder.resolve() == output.resolve() and not force:
        raise InputError(
            "The new bundle would take the place of the old one.",
            given=str(output),
            advice="Give another --output, or --force to replace it when the new one is whole.",
        )
