"""The table of a recipe's keys: each with its type, bounds, default and what `--help`, errors and editors say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hidiff_export.demo_model import DEMO_SOURCE
from hidiff_export.families.family import PIXELS_PER_LATENT, Family, Task, Width
from hidiff_export.recipe.field_types import (
    DEFAULT_TARGETS,
    DISTINCT,
    LARGEST,
    MOST_EXAMPLES,
    MOST_STEPS,
    MULTIPLE,
    ONE_OR_A_LIST,
    SMALLEST,
    BackendName,
    Batch,
    BetaSchedule,
    BucketShape,
    EnginePerPhase,
    ExamplePrompt,
    Fraction,
    PictureSize,
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
from hidiff_export.recipe.sections import (
    ForecastSettings,
    FractionRange,
    Frozen,
    HiDiffusionSettings,
    LoraSource,
    ParityBounds,
    ReuseSettings,
    also_fraction,
    lone_end,
    without_default,
)

_SIDE = f"a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST}."


def _also_one(schema: dict[str, Any]) -> None:
    """What is a list may also be written as its only item."""
    item = schema["items"]
    schema["anyOf"] = [item, {"type": schema.pop("type"), "items": schema.pop("items"), "minItems": 1}]


def _first_size(sizes: Any) -> tuple[int, int]:
    """Returns the first of a recipe's sizes; any where that is none, of which the field's own check says what is."""
    listed = [sizes] if isinstance(sizes, str) else sizes
    try:
        first: tuple[int, int] = TypeAdapter(PictureSize).validate_python(listed[0])
    except (ValidationError, LookupError, TypeError):
        return SMALLEST, SMALLEST
    return first


def _optional_list(schema: dict[str, Any]) -> None:
    """What is a list may also be written as its only item, or left out."""
    without_default(schema)
    schema["anyOf"].append(schema["anyOf"][0]["items"])


def _also_switch(schema: dict[str, Any]) -> None:
    """What is a mapping may also be switched on as it is, or off."""
    without_default(schema)
    schema["anyOf"].append({"type": "boolean"})


def _also_whole(schema: dict[str, Any]) -> None:
    """What is a mapping may also be written as its first number."""
    without_default(schema)
    schema["anyOf"].append({"type": "integer", "minimum": 2})


def _optional(description: str, schema: Callable[[dict[str, Any]], None] = without_default, **bounds: Any) -> Any:
    """Returns a field that is None where a recipe does not have the key; editors offer no default for it."""
    return Field(default=None, description=description, json_schema_extra=schema, **bounds)


def _default_targets(data: Mapping[str, Any]) -> tuple[Target, ...]:
    return tuple(dict.fromkeys(target for backend in data["backend"] for target in DEFAULT_TARGETS[backend]))


class RecipeFields(Frozen):
    """A recipe's values, each checked by itself. Sizes are in pixels."""

    name: StrictStr = Field(
        default="unnamed", pattern=r"^[\w.-]+$", description="A word of letters, digits, dots, dashes and underscores."
    )
    family: Family = Field(description=f"Model family: {choices(Family)}.")
    source: Source = Field(
        description="The checkpoint: a hub id like org/name, a diffusers folder, a .safetensors file, demo for the "
        "model that comes with the package, or random:SEED."
    )
    unet_width: Width = Field(
        default=Width.FULL,
        description="How many channels: full as published; of a random:SEED checkpoint, tiny for the same modules with "
        "few; demo for a model of examples/demo_model, and what source: demo comes to by itself.",
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
    prediction: Prediction | None = _optional(
        f"What the UNet predicts: {choices(Prediction)}; by default what the checkpoint says, or its family's."
    )
    beta_schedule: BetaSchedule | None = _optional(
        f"How the noise grows in training: {choices(BetaSchedule)}; by default as the checkpoint says."
    )
    beta_start: Fraction | None = _optional(
        "The noise schedule's first beta, 0 to 1; by default as the checkpoint says."
    )
    beta_end: Fraction | None = _optional("The noise schedule's last beta, 0 to 1; by default as the checkpoint says.")
    rescale_betas_zero_snr: StrictBool | None = _optional(
        "Whether the noise schedule ends in pure noise (zero terminal SNR): true or false; by default as "
        "the checkpoint says."
    )
    timestep_spacing: TimestepSpacing | None = _optional(
        f"Where the timesteps of a run lie: {choices(TimestepSpacing)}; by default as the checkpoint says. "
        "Checkpoints for a few steps (Lightning, Hyper-SD) want trailing."
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
    vae_tile: StrictInt | None = _optional(
        "Longest side of the VAE's tiles in pixels, a multiple of 64; by default the picture's if it fits.",
        ge=SMALLEST,
        le=LARGEST,
        multiple_of=64,
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
    sizes: Annotated[tuple[PictureSize, ...], ONE_OR_A_LIST, DISTINCT] | None = _optional(
        "Every size that the bundle draws, as WIDTHxHEIGHT: [1024x1024, 1216x832]; the first is the one of runs that "
        "do not say. Instead of width and height, which are one size.",
        _optional_list,
    )
    batches: Annotated[tuple[Batch, ...], DISTINCT] | None = _optional(
        "Every batch of each size: [1, 4]; instead of batch, which is one."
    )
    also: Annotated[tuple[BucketShape, ...], ONE_OR_A_LIST] | None = _optional(
        "Further sizes, each with a batch of its own, as WIDTHxHEIGHTxBATCH: [832x1216x4].", _optional_list
    )
    guidance: StrictBool = Field(
        default=True,
        description="Whether the negative prompt is evaluated too, which doubles the batch: true or false.",
    )
    guidance_rescale: StrictFloat | None = _optional(
        "How strongly guidance is rescaled in runs that do not say, 0 to 1: 0.7 for zero terminal SNR.", ge=0, le=1
    )
    forecast: ForecastSettings | None = _optional(
        "Whether later evaluations of a run are forecast from earlier ones, which takes 19 of 50: true or false, or a "
        "mapping of warm_up, window, growth and last.",
        _also_switch,
    )
    guidance_until: FractionRange | None = _optional(
        "The part of the run that is guided, after which the UNet is asked for the prompts alone, at half the batch: a "
        "ratio like 0.6, or {start: 10%, end: 60%}; left out, all of it.",
        also_fraction,
    )
    reuse: ReuseSettings | None = _optional(
        "How long deep features of the UNet are reused: 3 computes every third evaluation in full; or a mapping of "
        "every and depth; left out, never.",
        _also_whole,
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
        "cpu for onnxruntime and openvino, cuda for tensorrt, sm89 and sm120 for tensorrt-rtx.",
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
    timesteps: Timesteps | None = _optional(
        "The timesteps of the one run that is tabulated, falling: [999, 749, 499, 249]; steps is their number."
    )
    tcd_eta: Fraction = Field(
        default=0.3, description="How much noise the sampler tcd adds in each step: 0 to 1, fixed in its table."
    )
    example_prompts: Annotated[tuple[ExamplePrompt, ...], Field(max_length=MOST_EXAMPLES)] = Field(
        default=(),
        description=f"Prompts that the model draws well, up to {MOST_EXAMPLES}: hidiff-serve's page offers them.",
    )
    parity: ParityBounds = Field(
        default=ParityBounds(),
        description="A mapping of call_snr_db and run_snr_db.",
        json_schema_extra=without_default,
    )

    @model_validator(mode="before")
    @classmethod
    def _width_of_the_demo_model(cls, data: Any) -> Any:
        """The model that comes with the package has one width, which nobody needs to name."""
        if isinstance(data, Mapping) and data.get("source") == DEMO_SOURCE:
            return {"unet_width": Width.DEMO.value, **data}
        return data

    @model_validator(mode="before")
    @classmethod
    def _first_of_sizes_and_batches(cls, data: Any) -> Any:
        """Width, height and batch are those of the first bucket, which lists name already."""
        if not isinstance(data, Mapping):
            return data
        first: dict[str, Any] = {}
        if data.get("sizes") is not None:
            first |= dict(zip(("width", "height"), _first_size(data["sizes"]), strict=True))
        batches = data.get("batches")
        if isinstance(batches, (list, tuple)) and batches and type(batches[0]) is int and batches[0] > 0:
            first["batch"] = batches[0]
        return {**first, **data}

    @model_validator(mode="before")
    @classmethod
    def _steps_of_timesteps(cls, data: Any) -> Any:
        """Timesteps are one run's, so they say how many steps there are."""
        if isinstance(data, Mapping) and "steps" not in data and isinstance(data.get("timesteps"), (list, tuple)):
            return {**data, "steps": max(1, len(data["timesteps"]))}
        return data

    @field_validator("forecast", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """Takes true for a mapping that says nothing."""
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("guidance_until", mode="before")
    @classmethod
    def _end_of_guidance(cls, value: Any) -> Any:
        """Takes a lone fraction for the end of a range that starts with the run."""
        return lone_end(value)

    @field_validator("reuse", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        """Takes a lone number for how often the whole UNet is computed."""
        return {"every": value} if type(value) is int else value

    @field_validator("parity")
    @classmethod
    def _bounds_of_the_precision(cls, given: ParityBounds, info: ValidationInfo) -> ParityBounds:
        return given.for_precision(info.data.get("precision", Precision.FLOAT32))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Width, height and batch of each bucket: every batch of every size, the first bucket's first."""
        sizes = self.sizes or ((self.width, self.height),)
        product = [(*size, batch) for batch in self.batches or (self.batch,) for size in sizes]
        return tuple(dict.fromkeys([*product, *(self.also or ())]))

    @property
    def latent_height(self) -> int:
        """Rows of the latents."""
        return self.height // PIXELS_PER_LATENT

    @property
    def latent_width(self) -> int:
        """Columns of the latents."""
        return self.width // PIXELS_PER_LATENT

    @property
    def random_seed(self) -> int | None:
        """The seed of a fabricated checkpoint; None where ``source`` is a real one."""
        return random_seed(self.source)
