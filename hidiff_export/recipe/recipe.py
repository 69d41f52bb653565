"""A recipe: what to build, as frozen, checked values, and everything that follows from them without torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hidiff_export.errors import RecipeError
from hidiff_export.families import family as families
from hidiff_export.families import hidiffusion_rules
from hidiff_export.families.family import LATENT_CHANNELS, PIXELS_PER_LATENT, Family, Task, Width
from hidiff_export.families.graph_io import PROMPT_TOKENS
from hidiff_export.families.hidiffusion_rules import Layout
from hidiff_export.families.vae_tiling import VaeTiles
from hidiff_export.recipe.consistency import check_agreement
from hidiff_export.recipe.field_types import (
    DISTINCT,
    LARGEST,
    MOST_STEPS,
    MULTIPLE,
    ONE_OR_A_LIST,
    SMALLEST,
    BackendName,
    BetaSchedule,
    EnginePerPhase,
    Fraction,
    Precision,
    Prediction,
    SamplerName,
    Source,
    Steps,
    Target,
    Timesteps,
    TimestepSpacing,
    choices,
    random_seed,
)
from hidiff_export.recipe.library import find_recipe
from hidiff_export.recipe.sections import (
    FractionRange,
    Frozen,
    HiDiffusionSettings,
    LoraSource,
    ParityBounds,
    without_default,
)
from hidiff_export.recipe.validation_errors import recipe_error
from hidiff_export.recipe.yaml_source import RecipeSource
from hidiff_runtime.phases import PhaseRule, StepRange

_SIDE = f"a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST}."


def _also_one(schema: dict[str, Any]) -> None:
    """What is a list may also be written as its only item."""
    item = schema["items"]
    schema["anyOf"] = [item, {"type": schema.pop("type"), "items": schema.pop("items"), "minItems": 1}]


def _default_targets(data: Mapping[str, Any]) -> tuple[Target, ...]:
    return tuple(target for backend in data["backend"] for target in backend.default_targets)


@dataclass(frozen=True)
class _Origin:
    """Where a recipe's values were written, which is no part of what they say: all origins are equal."""

    source: RecipeSource | None = field(default=None, compare=False)


class Recipe(Frozen):
    """What to build: checkpoint, picture, phases, precision, engines and proof.

    Everything is in the recipe's own terms, sizes in pixels. `load` reads YAML, `from_dict` what `to_dict` gave; both
    raise `RecipeError`, building one directly raises pydantic's error.
    """

    _origin: _Origin = PrivateAttr(default=_Origin())

    name: StrictStr = Field(
        default="unnamed", pattern=r"^[\w.-]+$", description="A word of letters, digits, dots, dashes and underscores."
    )
    family: Family = Field(description=f"Model family: {choices(Family)}.")
    source: Source = Field(
        description="The checkpoint: a hub id like org/name, a diffusers folder, a .safetensors file, or random:SEED."
    )
    unet_width: Width = Field(
        default=Width.FULL,
        description="Of a random:SEED checkpoint: full, or tiny for the same modules with few channels.",
    )
    controlnet: Source | None = Field(
        default=None,
        description="The ControlNet's checkpoint, written like source; without one, residuals come from outside.",
    )
    lora: tuple[LoraSource, ...] = Field(
        default=(),
        description="LoRA files to fuse into the UNet and the bundle's text encoders, added in order: a list of "
        "{path, scale}.",
    )
    prediction: Prediction | None = Field(
        default=None,
        description=f"What the UNet predicts: {choices(Prediction)}; by default what the checkpoint says, or its "
        "family's.",
        json_schema_extra=without_default,
    )
    beta_schedule: BetaSchedule | None = Field(
        default=None,
        description=f"How the noise grows in training: {choices(BetaSchedule)}; by default as the checkpoint says.",
        json_schema_extra=without_default,
    )
    beta_start: Fraction | None = Field(
        default=None,
        description="The noise schedule's first beta, 0 to 1; by default as the checkpoint says.",
        json_schema_extra=without_default,
    )
    beta_end: Fraction | None = Field(
        default=None,
        description="The noise schedule's last beta, 0 to 1; by default as the checkpoint says.",
        json_schema_extra=without_default,
    )
    rescale_betas_zero_snr: StrictBool | None = Field(
        default=None,
        description="Whether the noise schedule ends in pure noise (zero terminal SNR): true or false; by default as "
        "the checkpoint says.",
        json_schema_extra=without_default,
    )
    timestep_spacing: TimestepSpacing | None = Field(
        default=None,
        description=f"Where the timesteps of a run lie: {choices(TimestepSpacing)}; by default as the checkpoint says. "
        "Checkpoints for a few steps (Lightning, Hyper-SD) want trailing.",
        json_schema_extra=without_default,
    )
    text: StrictBool = Field(
        default=True, description="Whether tokenizers and text encoders come too, for prompts as text: true or false."
    )
    prompt_chunks: StrictInt = Field(
        default=1,
        ge=1,
        le=4,
        description="How many chunks of 75 tokens a long prompt may fill, 1 to 4; each takes its part of every step.",
    )
    vae: StrictBool = Field(
        default=True, description="Whether the VAE comes too, for pictures instead of latents: true or false."
    )
    vae_tile: StrictInt | None = Field(
        default=None,
        ge=SMALLEST,
        le=LARGEST,
        multiple_of=64,
        description="Longest side of the VAE's tiles in pixels, a multiple of 64; by default the picture's if it fits.",
        json_schema_extra=without_default,
    )
    task: Task = Field(
        default=Task.TEXT_TO_IMAGE,
        description=f"What the UNet is to do: {choices(Task)}.",
    )
    width: StrictInt = Field(
        ge=SMALLEST, le=LARGEST, multiple_of=MULTIPLE, description=f"The picture's width in pixels: {_SIDE}"
    )
    height: StrictInt = Field(
        ge=SMALLEST, le=LARGEST, multiple_of=MULTIPLE, description=f"The picture's height in pixels: {_SIDE}"
    )
    batch: StrictInt = Field(default=1, ge=1, le=64, description="Pictures of one run: 1 to 64.")
    guidance: StrictBool = Field(
        default=True,
        description="Whether the negative prompt is evaluated too, which doubles the batch: true or false.",
    )
    guidance_rescale: StrictFloat | None = Field(
        default=None,
        ge=0,
        le=1,
        description="How strongly guidance is rescaled in runs that do not say, 0 to 1: 0.7 for zero terminal SNR.",
        json_schema_extra=without_default,
    )
    precision: Precision = Field(
        default=Precision.FLOAT32, description=f"Type of the weights and the arithmetic: {choices(Precision)}."
    )
    hidiffusion: HiDiffusionSettings = Field(
        default=HiDiffusionSettings(), description="A mapping of raunet, windows and thresholds."
    )
    backend: Annotated[tuple[BackendName, ...], ONE_OR_A_LIST, DISTINCT] = Field(
        default=(BackendName.ONNXRUNTIME,),
        description="What builds and runs the engines, one or a list with the default one first: "
        f"{choices(BackendName)}.",
        json_schema_extra=_also_one,
    )
    targets: Annotated[tuple[Target, ...], ONE_OR_A_LIST, DISTINCT] = Field(
        default_factory=_default_targets,
        description=f"What the engines are for, one or a list: {choices(Target)}; by default what suits the backend: "
        "cpu for onnxruntime, cuda for tensorrt, sm89 and sm120 for tensorrt-rtx.",
        json_schema_extra=_also_one,
    )
    layout: EnginePerPhase = Field(
        default="per-phase",
        description="How TensorRT engines hold the phases: always per-phase, an engine for each. Leave it out.",
    )
    sampler: Annotated[tuple[SamplerName, ...], ONE_OR_A_LIST, DISTINCT] = Field(
        default=(SamplerName.DDIM,),
        description=f"One sampler to tabulate, or a list with the default one first: {choices(SamplerName)}.",
        json_schema_extra=_also_one,
    )
    steps: Steps = Field(
        default=tuple(range(1, 101)),
        json_schema_extra={"default": "1-100"},
        description=f"Step counts to tabulate, 1 to {MOST_STEPS}: a number, a range like 1-100, or a list of both.",
    )
    timesteps: Timesteps | None = Field(
        default=None,
        description="The timesteps of the one run that is tabulated, falling: [999, 749, 499, 249]; steps is their "
        "number.",
        json_schema_extra=without_default,
    )
    tcd_eta: Fraction = Field(
        default=0.3, description="How much noise the sampler tcd adds in each step: 0 to 1, fixed in its table."
    )
    parity: ParityBounds = Field(
        default=ParityBounds(),
        description="A mapping of call_snr_db and run_snr_db.",
        json_schema_extra=without_default,
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_of_timesteps(cls, data: Any) -> Any:
        """Timesteps are one run's, so they say how many steps there are."""
        if isinstance(data, Mapping) and "steps" not in data and isinstance(data.get("timesteps"), (list, tuple)):
            return {**data, "steps": max(1, len(data["timesteps"]))}
        return data

    @field_validator("parity")
    @classmethod
    def _bounds_of_the_precision(cls, given: ParityBounds, info: ValidationInfo) -> ParityBounds:
        return given.for_precision(info.data.get("precision", Precision.FLOAT32))

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
        return cls._validated(source.with_default("name", re.sub(r"[^\w.-]+", "-", path.stem)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
        """The recipe that `to_dict` wrote, for example in a manifest.

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
        """The error for a valid value that does not suit what was found elsewhere, a checkpoint for example.

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
        """Every value, defaults included, as JSON types; the same recipe always gives the same dictionary."""
        return self.model_dump(mode="json", exclude_none=True)

    def fingerprint(self) -> str:
        """SHA-256 of the recipe's canonical JSON, without its name."""
        values = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def latent_height(self) -> int:
        """Rows of the latents."""
        return self.height // PIXELS_PER_LATENT

    @property
    def latent_width(self) -> int:
        """Columns of the latents."""
        return self.width // PIXELS_PER_LATENT

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents that are denoised."""
        return LATENT_CHANNELS, self.latent_height, self.latent_width

    @property
    def model_batch(self) -> int:
        """Latents of one evaluation: twice the batch with guidance, the negative prompt's first."""
        return self.batch * 2 if self.guidance else self.batch

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt's embedding, the chunks' starts, ends and padding included."""
        return self.prompt_chunks * PROMPT_TOKENS

    @property
    def tiles(self) -> VaeTiles:
        """How the VAE sees the picture."""
        return VaeTiles.of(self.height, self.width, self.vae_tile)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that the bundle holds."""
        return tuple(families.text_encoder_configs(self.family, self.unet_width)) if self.text else ()

    @property
    def random_seed(self) -> int | None:
        """The seed of a fabricated checkpoint; None where ``source`` is a real one."""
        return random_seed(self.source)

    @property
    def unet_layout(self) -> Layout:
        """Where the UNet is changed; without windowed blocks when the windows are off."""
        layout = Layout.of(self.family)
        return layout if self.hidiffusion.windows else layout.without_windows()

    def unet_config(self) -> dict[str, Any]:
        """The UNet's published configuration, at the recipe's width."""
        return families.unet_config(self.family, self.task, self.unet_width)

    def controlnet_config(self) -> dict[str, Any]:
        """The ControlNet's published configuration, at the recipe's width."""
        return families.controlnet_config(self.family, self.unet_width)

    def phase_rule(self) -> PhaseRule:
        """When each change is in force."""
        rule = hidiffusion_rules.phase_rule(self.family, self.task, self.width, self.height)
        given = self.hidiffusion.thresholds
        if given is not None:
            control = rule.control if given.control is None else given.control
            rule = PhaseRule(_step_range(given.strided), _step_range(given.pooled), control)
        return rule if self.hidiffusion.raunet else PhaseRule(control=rule.control)


def _overridden(source: RecipeSource, overrides: Iterable[str]) -> RecipeSource:
    changed = source.overridden(overrides)
    if ("timesteps",) in changed.overrides and ("steps",) not in changed.overrides:
        return changed.without("steps")  # those that were written count another run's steps
    return changed


def _step_range(given: FractionRange | None) -> StepRange | None:
    return None if given is None else StepRange(given.start, given.end)
