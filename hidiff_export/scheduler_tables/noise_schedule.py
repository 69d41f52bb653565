"""The noise schedule of a bundle: what the checkpoint says, and what the recipe says over it.

The recipe comes first, then what a LoRA for few steps wants, then the checkpoint's scheduler configuration or, for a
single file, what it says of itself, and last its family's. Where two of them disagree a notice names both.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from hidiff_export.checkpoints.declarations import (
    FLOW,
    PREDICTION,
    ZERO_SNR,
    Declarations,
    FewStep,
    Statement,
    read_declarations,
    recognize,
)
from hidiff_export.checkpoints.sources import find_scheduler_config, is_single_file, local_path
from hidiff_export.errors import CheckpointError, ExportError, RecipeError
from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.scheduler_tables.diffusers_schedulers import build_scheduler, corrected
from hidiff_export.scheduler_tables.names import EDM_SCHEDULERS, has_edm_schedule

if TYPE_CHECKING:
    from hidiff_export.recipe import Recipe

SPACING = "timestep_spacing"
RECIPE_KEYS = {
    "prediction": PREDICTION,
    "beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "timestep_spacing": SPACING,
}
"""Words of a recipe, and the keys of diffusers' scheduler configurations that they set."""

_OF_THE_MODEL = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", PREDICTION, ZERO_SNR)
"""Keys that say what the model was trained with, whatever sampler draws it."""

_EDM_OF_FILES = {"_class_name": EDM_SCHEDULERS[0], "sigma_data": 1.0, "sigma_schedule": "exponential"}
"""EDM with v-prediction as ComfyUI and diffusers draw CosXL, whose file has the markers but not these two."""

_DISTILLED_CLASSES = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
_FEW = 8
"""Steps up to which a run is one of few steps."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How a bundle's runs are laid out.

    Args:
        config: of diffusers' scheduler, as its ``from_config`` takes it.
        declared: keys of ``config`` that the checkpoint itself settled, not its family or the recipe.
        notices: one line each for the user.
        distilled: whether the checkpoint or a LoRA was recognized as one for few steps, and the notices say so.
    """

    config: dict[str, Any]
    declared: frozenset[str]
    notices: tuple[str, ...]
    distilled: bool = False


def resolve_noise_schedule(recipe: Recipe) -> NoiseSchedule:
    """Returns the noise schedule of a recipe's bundle. Reads configurations and headers, and no weights.

    Raises:
        CheckpointError: a file is missing or damaged, or contradicts itself and the recipe does not settle it.
        RecipeError: the checkpoint's noise schedule cannot be drawn, or not with one of the recipe's samplers.
        StorageError: when a download cannot be written.
    """
    schedule = checkpoint_schedule(recipe)
    _check_class(recipe, schedule.config)
    schedule = _with_loras(recipe, schedule)
    schedule = _with_recipe(recipe, schedule)
    _check_samplers(recipe, schedule.config)
    return replace(schedule, notices=(*schedule.notices, *_hints(recipe, schedule)))


def checkpoint_schedule(recipe: Recipe) -> NoiseSchedule:
    """Returns what the checkpoint of a recipe says by itself; the recipe's words count where a file contradicts itself.

    Raises:
        CheckpointError: a file is missing or damaged, or contradicts itself.
        StorageError: when a download cannot be written.
    """
    own = find_scheduler_config(recipe.source)
    if own is not None:
        config = corrected({**_class_defaults(own), **own}, recipe.family, recipe.task)
        return NoiseSchedule(config, frozenset(config), ())
    config = dict(default_scheduler(recipe.family)[1])
    if not is_single_file(recipe.source):
        return NoiseSchedule(config, frozenset(), ())
    return _of_file(recipe, config, read_declarations(local_path(recipe.source)))


def _class_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a configuration leaves to its class's defaults. Another class would fill in its own."""
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = {} if kind is None else inspect.signature(kind.__init__).parameters
    return {key: parameters[key].default for key in _OF_THE_MODEL if key in parameters}


def _of_file(recipe: Recipe, family: Mapping[str, Any], found: Declarations) -> NoiseSchedule:
    """Returns a single file's schedule: its family's, but for what it says of itself."""
    config, name = dict(family), found.path.name
    if found.sigmas is not None:
        config = {**_EDM_OF_FILES, "num_train_timesteps": config["num_train_timesteps"], **found.sigmas}
    settled: dict[str, Statement] = {}
    for recipe_key, key in RECIPE_KEYS.items():
        if statements := found.of(key):
            _check_agreement(recipe, recipe_key, found, statements)
            settled[key] = statements[0]
    if PREDICTION in settled and settled[PREDICTION].value == FLOW and recipe.prediction is None:
        raise recipe.refused(
            "source",
            "is a checkpoint of flow matching, and cannot be drawn",
            given=f"{recipe.source}: {settled[PREDICTION].where}",
            advice="Give one that predicts epsilon or v_prediction; if this one does, --set prediction=epsilon or "
            "v_prediction says so.",
        )
    notices = [
        f"{name} says {line}, which is no word known here, and it is passed over: --set prediction=epsilon or "
        "v_prediction says what holds."
        for line in found.unread
        if recipe.prediction is None
    ]
    if settled:
        said = "; ".join(f"{key} {_shown(one.value)} ({one.where})" for key, one in settled.items())
        notices.append(f"{name} says of itself: {said}.")
    elif recipe.family is Family.SD21 and recipe.prediction is None:
        notices.append(
            f"{name} does not say what its UNet predicts, and epsilon is taken, as SD2.1's model for 512 pixels does: "
            "the model for 768 pixels wants --set prediction=v_prediction."
        )
    config |= {key: statement.value for key, statement in settled.items()}
    declared = frozenset(settled if found.sigmas is None else config)
    return _with_few_steps(recipe, found, NoiseSchedule(config, declared, tuple(notices)))


def _check_agreement(recipe: Recipe, key: str, found: Declarations, statements: Sequence[Statement]) -> None:
    """Refuses a file that says two things, unless the recipe says which holds."""
    if len({statement.value for statement in statements}) == 1 or getattr(recipe, key) is not None:
        return
    drawable = next((one.value for one in statements if one.value not in (FLOW, "sample")), "epsilon")
    raise CheckpointError(
        f"The checkpoint contradicts itself about {RECIPE_KEYS[key]}.",
        given=f"{found.path.name}: " + "; ".join(f"{_shown(one.value)} by {one.where}" for one in statements),
        advice=f"Say which holds: --set {key}={_shown(drawable)}, or {key} in the recipe.",
    )


def _with_loras(recipe: Recipe, schedule: NoiseSchedule) -> NoiseSchedule:
    """Returns what LoRA files were trained for, beside what the checkpoint is."""
    for lora in recipe.lora:
        found = read_declarations(Path(lora.path), "LoRA file")
        schedule = _with_few_steps(recipe, found, schedule)
        notices = list(schedule.notices)
        for recipe_key, key in RECIPE_KEYS.items():
            wanted = getattr(recipe, recipe_key)
            here = schedule.config.get(key) if wanted is None else getattr(wanted, "value", wanted)
            notices += [
                f"{found.path.name} was trained for {key} {_shown(one.value)} ({one.where}), and the bundle has "
                f"{_shown(here or False)}: {_remedy(recipe_key, one)}."
                for one in found.of(key)[:1]
                if one.value != (here or False)
            ]
        schedule = replace(schedule, notices=tuple(notices))
    return schedule


def _remedy(recipe_key: str, trained_for: Statement) -> str:
    if trained_for.value == FLOW:
        return "models of flow matching cannot be drawn; leave the LoRA out if it is one's"
    if trained_for.value == "sample":
        return "a checkpoint that predicts the sample has to say so in its scheduler's configuration"
    return f"if the checkpoint is such a one, --set {recipe_key}={_shown(trained_for.value)}"


def _with_few_steps(recipe: Recipe, found: Declarations, schedule: NoiseSchedule) -> NoiseSchedule:
    """Returns a schedule with the spacing that a file for few steps wants, if it says so plainly, and with notices."""
    few = recognize(found.path.name, found.texts)
    if few is None:
        return schedule
    spacing = few.distillation.spacing
    settled = recipe.timestep_spacing or recipe.timesteps or schedule.config.get(SPACING) == spacing
    wanted = spacing is not None and not settled
    taken = {SPACING: spacing} if wanted and few.steps is not None and few.steps <= _FEW else {}
    notices = _few_step_notices(recipe, few, found.path.name, wanted and not taken, bool(taken))
    config, declared = {**schedule.config, **taken}, schedule.declared | taken.keys()
    return NoiseSchedule(config, declared, (*schedule.notices, *notices), distilled=True)


def _few_step_notices(recipe: Recipe, few: FewStep, name: str, unsaid: bool, taken: bool) -> Iterator[str]:
    kind = few.distillation
    if taken:
        yield (
            f"{name} is {kind.name}'s for {few.steps} steps by {few.where}: timestep_spacing {kind.spacing} is taken; "
            f"--set timestep_spacing=leading says otherwise."
        )
    elif unsaid:
        yield (
            f"{name} looks like {kind.name}'s by {few.where}: if it is for a few steps, "
            f"--set timestep_spacing={kind.spacing} lets runs begin at the last training timestep, as it was trained."
        )
    if few.steps is not None and few.steps not in recipe.steps:
        yield f"{name} is for {few.steps} steps, which the recipe does not tabulate: --set steps={few.steps}."
    if few.steps is not None and recipe.guidance:
        yield f"{name} is drawn without guidance: --set guidance=false, or ask for guidance_scale 1."
    # The kinds that have timesteps of their own have them from their sampler, whatever the number of steps.
    own_sampler = few.steps is not None or kind.spacing is None
    if own_sampler and not {sampler.value for sampler in recipe.sampler} & set(kind.samplers):
        yield f"{name} is drawn with {' or '.join(kind.samplers)}: --set sampler={kind.samplers[0]}."


def _with_recipe(recipe: Recipe, schedule: NoiseSchedule) -> NoiseSchedule:
    config, notices = dict(schedule.config), list(schedule.notices)
    for recipe_key, key in RECIPE_KEYS.items():
        given = getattr(recipe, recipe_key)
        if given is None:
            continue
        value = getattr(given, "value", given)
        if key in schedule.declared and (config.get(key) or False) != value:
            notices.append(
                f"{recipe_key} {_shown(value)} of the recipe takes the place of {_shown(config.get(key))}, which "
                f"{recipe.source} says of itself."
            )
        config[key] = value
    return replace(schedule, config=config, notices=tuple(notices))


def _check_class(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuses noise schedules that no sampler here draws. Diffusers would fill in its own defaults for them."""
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if (
        config.get("use_flow_sigmas")
        or (config.get(PREDICTION) == FLOW and recipe.prediction is None)
        or "Flow" in str(name)
    ):
        raise _undrawable(recipe, f"{name}, which is flow matching")
    keys = config if kind is None else inspect.signature(kind.__init__).parameters
    if name is not None and name not in EDM_SCHEDULERS and "beta_start" not in keys and not config.get("trained_betas"):
        raise _undrawable(recipe, str(name))


def _undrawable(recipe: Recipe, what: str) -> RecipeError:
    return recipe.refused(
        "source",
        "is a checkpoint whose noise schedule has no betas, and cannot be drawn",
        given=f"{recipe.source}: scheduler {what}",
        advice="Give a checkpoint of Stable Diffusion; if it is one, its scheduler/scheduler_config.json is another "
        "model's: put its own there.",
    )


def _check_samplers(recipe: Recipe, config: Mapping[str, Any]) -> None:
    for sampler in recipe.sampler:
        try:
            build_scheduler(sampler.value, config, timesteps=recipe.timesteps, tcd_eta=recipe.tcd_eta)
        except ExportError as error:
            raise recipe.refused(
                "sampler",
                f"has {sampler.value}, which does not draw this noise schedule",
                given=f"{error.summary} ({error.given})",
                advice=error.advice,
            ) from error


def _hints(recipe: Recipe, schedule: NoiseSchedule) -> Iterator[str]:
    """Yields what a person would want to know who did not mean it."""
    config = schedule.config
    own = _DISTILLED_CLASSES.get(str(config.get("_class_name")))
    if own is not None and own not in {sampler.value for sampler in recipe.sampler}:
        yield (
            f"{recipe.source} comes with {config['_class_name']}, which distilled checkpoints are drawn with: "
            f"--set sampler={own}."
        )
    if recipe.timesteps is None and not has_edm_schedule(config):
        yield from _late_starts(recipe, config, asked_about=schedule.distilled)


def _late_starts(recipe: Recipe, config: Mapping[str, Any], *, asked_about: bool) -> Iterator[str]:
    """Yields what to say of runs of the default sampler that begin far from pure noise, if that was not said before."""
    scheduler = build_scheduler(recipe.sampler[0].value, config)
    last = scheduler.config.num_train_timesteps - 1
    few = [steps for steps in recipe.steps if steps <= _FEW]
    begins = {steps: _first_timestep(scheduler, steps, last) for steps in (*few, recipe.steps[-1])}
    if few and few[-1] == recipe.steps[-1] and begins[few[0]] < last / 2:
        yield (
            f"A run of {few[0]} step{'s' * (few[0] > 1)} begins at timestep {begins[few[0]]:g} of {last} and gives "
            "noise: --set timestep_spacing=trailing lets it begin at the last."
        )
    elif few and not recipe.guidance and not asked_about and begins[few[-1]] < last * 0.95:
        yield (
            f"Runs of few steps begin before the last timestep, {few[-1]} steps at {begins[few[-1]]:g} of {last}: "
            "checkpoints distilled for few steps (Lightning, Hyper-SD, DMD2, Turbo) want "
            "--set timestep_spacing=trailing."
        )
    if config.get(ZERO_SNR) and begins[recipe.steps[-1]] < last:
        yield (
            f"The noise schedule ends in pure noise at timestep {last}, and a run of {recipe.steps[-1]} steps begins "
            f"at {begins[recipe.steps[-1]]:g}: --set timestep_spacing=trailing lets runs begin at the end."
        )


def _first_timestep(scheduler: Any, steps: int, last: int) -> float:
    """Returns where a run begins; the last timestep where the scheduler does not run with so many steps."""
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError):
        return last
    return float(scheduler.timesteps[0])


def _shown(value: object) -> str:
    """Returns a value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
