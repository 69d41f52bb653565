"""A recipe: what to build, as frozen, checked values, what follows from them without torch, and where recipes are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError, model_validator

from hidiff_export.errors import RecipeError
from hidiff_export.families import family as families
from hidiff_export.families import hidiffusion_rules
from hidiff_export.families.family import LATENT_CHANNELS
from hidiff_export.families.graph_io import PROMPT_TOKENS, shifts_shape
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.vae_tiling import VaeTiles
from hidiff_export.recipe.consistency import check_agreement
from hidiff_export.recipe.recipe_fields import RecipeFields
from hidiff_export.recipe.sections import FractionRange
from hidiff_export.recipe.validation_errors import recipe_error
from hidiff_export.recipe.yaml_source import RecipeSource, nearest
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import Phase, PhaseRule, StepRange


@dataclass(frozen=True)
class _Origin:
    """Where a recipe's values were written, which is no part of what they say: all origins are equal."""

    source: RecipeSource | None = field(default=None, compare=False)


class Recipe(RecipeFields):
    """What to build: checkpoint, picture, phases, precision, engines and proof.

    Everything is in the recipe's own terms, sizes in pixels. `load` reads YAML, `from_dict` what `to_dict` gave; both
    raise `RecipeError`, building one directly raises pydantic's error.
    """

    _origin: _Origin = PrivateAttr(default=_Origin())

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        check_agreement(self)
        return self

    @classmethod
    def load(cls, recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Reads a recipe.

        Args:
            recipe: the path of a YAML file, or the name of a shipped recipe.
            overrides: ``KEY=VALUE`` texts that replace values, the keys dotted: ``hidiffusion.windows=false``.

        Raises:
            RecipeError: there is no such recipe, or it is not valid; the message names file, line, key and value.
        """
        path = find_recipe(recipe)
        source = _overridden(RecipeSource.read(path), overrides)
        name = re.sub(r"[^\w.-]+", "-", path.stem)
        return cls._validated(replace(source, data={"name": name, **source.data}))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
        """Returns the recipe that `to_dict` wrote, for example in a manifest.

        Args:
            data: what it wrote.
            origin: names it in errors.
            overrides: as for `load`.

        Raises:
            RecipeError: it is not valid.
        """
        return cls._validated(_overridden(RecipeSource.of(data, origin), overrides))

    @classmethod
    def _validated(cls, source: RecipeSource) -> Recipe:
        try:
            recipe = cls.model_validate(source.data)
        except ValidationError as error:
            raise recipe_error(error, source, cls) from None
        recipe._origin = _Origin(source)
        return recipe

    def refused(self, key: str, what: str, *, given: object = None, advice: str = "") -> RecipeError:
        """Returns the error for a valid value that does not suit what was found elsewhere, a checkpoint for example.

        Args:
            key: of the value; the error names the line that it was written on.
            what: follows the key in the message: ``should be …``.
            given: the value, or what it is at odds with.
            advice: what to do.
        """
        source = self._origin.source
        place = "recipe" if source is None else source.place((key,))
        return RecipeError(f"{place}: `{key}` {what}.", given=given, advice=advice)

    def to_dict(self) -> dict[str, Any]:
        """Returns every value, defaults included, as JSON types; the same recipe always gives the same dictionary."""
        return self.model_dump(mode="json", exclude_none=True)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the recipe's canonical JSON, without its name."""
        values = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def buckets(self) -> tuple[Recipe, ...]:
        """The recipe of each size and batch by itself, in the order of `shapes`; the first is the default."""
        return tuple(self._of_shape(*shape) for shape in self.shapes)

    def of_shapes(self, shapes: Sequence[tuple[int, int, int]]) -> Recipe:
        """Returns the recipe of these widths, heights and batches, the default first, and of no others."""
        first, *others = shapes
        return self._of_shape(*first).model_copy(update={"also": tuple(others) or None})

    def _of_shape(self, width: int, height: int, batch: int) -> Recipe:
        alone: dict[str, Any] = {"sizes": None, "batches": None, "also": None}
        return self.model_copy(update={"width": width, "height": height, "batch": batch, **alone})

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents that are denoised."""
        return LATENT_CHANNELS, self.latent_height, self.latent_width

    @property
    def model_batch(self) -> int:
        """Latents of a guided evaluation: twice the batch with guidance, the negative prompt's first."""
        return self.batch * 2 if self.guidance else self.batch

    def batch_of(self, phase: Phase) -> int:
        """Returns the latents of one evaluation in a phase, which may be one without guidance."""
        return self.batch if phase.unguided else self.model_batch

    @property
    def own_shifts(self) -> bool:
        """Whether the phases' graphs take window shifts for each of their latents: where there are several pictures,
        none of which then depends on its neighbours in the batch.
        """
        return self.batch > 1

    def shifts_shape(self, phase: Phase) -> tuple[int, ...]:
        """Returns the shape of a phase's ``window_shifts``."""
        return shifts_shape(self.unet_layout, self.batch_of(phase) if self.own_shifts else None)

    def phase_options(self, phase: Phase) -> dict[str, Any]:
        """Returns what a phase's graph is besides a UNet, a layout, a phase and a size: arguments by name."""
        return {"prompt_tokens": self.prompt_tokens, "own_shifts": self.own_shifts, "reuse_depth": self.depth_of(phase)}

    def depth_of(self, phase: Phase) -> int | None:
        """Returns the depth at which a phase's graph takes deep features or gives them; None where it does neither."""
        rule = self.phase_rule()
        takes_part = rule.reuse is not None and (phase.shallow or rule.gives_features(phase))
        return rule.reuse.depth if takes_part and rule.reuse is not None else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt's embedding, the chunks' starts, ends and padding included."""
        return self.prompt_chunks * PROMPT_TOKENS

    @property
    def tiles(self) -> VaeTiles:
        """How the VAE sees the picture."""
        return VaeTiles.of(self.height, self.width, self.vae_tile)

    @property
    def forecast_record(self) -> Forecast | None:
        """Which evaluations of a run are computed, as the manifest says it; None for all."""
        return None if self.forecast is None else self.forecast.record()

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that the bundle holds."""
        return tuple(families.text_encoder_configs(self.family, self.unet_width)) if self.text else ()

    @property
    def unet_layout(self) -> Layout:
        """Where the UNet is changed; without windowed blocks when the windows are off."""
        layout = Layout.of(self.family)
        return layout if self.hidiffusion.windows else layout.without_windows()

    def unet_config(self) -> dict[str, Any]:
        """Returns the UNet's published configuration, at the recipe's width."""
        return families.unet_config(self.family, self.task, self.unet_width)

    def controlnet_config(self) -> dict[str, Any]:
        """Returns the ControlNet's published configuration, at the recipe's width."""
        return families.controlnet_config(self.family, self.unet_width)

    def phase_rule(self) -> PhaseRule:
        """Returns when each change is in force."""
        rule = hidiffusion_rules.phase_rule(self.family, self.task, self.width, self.height)
        given = self.hidiffusion.thresholds
        if given is not None:
            control = rule.control if given.control is None else given.control
            rule = PhaseRule(_step_range(given.strided), _step_range(given.pooled), control)
        if not self.hidiffusion.raunet:
            rule = PhaseRule(control=rule.control)
        reuse = None if self.reuse is None else self.reuse.record()
        return replace(rule, guidance=_step_range(self.guidance_until), reuse=reuse)


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come with the package, by name."""
    package = Path(__file__).parents[1]
    # A wheel carries them inside the package; a checkout keeps them beside it.
    folder = next(place for place in (package / "recipes", package.parent / "recipes") if place.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """Returns the file of a recipe given by path or by shipped name.

    Raises:
        RecipeError: it is neither.
    """
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(recipe)
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    raise RecipeError(
        "There is no such recipe.",
        given=str(recipe),
        advice=f"{nearest(str(recipe), shipped)}Give a YAML file, or one of {', '.join(shipped)}.",
    )


def _overridden(source: RecipeSource, overrides: Iterable[str]) -> RecipeSource:
    changed = source.overridden(overrides)
    if ("timesteps",) in changed.overrides and ("steps",) not in changed.overrides:
        changed.data.pop("steps", None)  # those that were written count another run's steps
    for single, several in ((("width", "height"), "sizes"), (("batch",), "batches")):
        given = {key for key in (*single, several) if (key,) in changed.overrides}
        if given == {several}:
            for key in single:
                changed.data.pop(key, None)
        elif given and several not in given:
            changed.data.pop(several, None)
    return changed


def _step_range(given: FractionRange | None) -> StepRange | None:
    return None if given is None else StepRange(given.start, given.end)
