"""A recipe: what to build, as frozen, checked values, and everything that follows from them without torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hidiff_export import families
from hidiff_export.families import LATENT_CHANNELS, PIXELS_PER_LATENT, Family, Layout, Task, Width
from hidiff_export.geometry import control_latent
from hidiff_export.recipe.file import RecipeSource
from hidiff_export.recipe.parts import Frozen, HiDiffusion, LoraFile, ParityBounds, Range, without_default
from hidiff_export.recipe.problems import recipe_error
from hidiff_export.recipe.shipped import find_recipe
from hidiff_export.recipe.values import (
    DISTINCT,
    LARGEST,
    MOST_STEPS,
    MULTIPLE,
    ONE_OR_A_LIST,
    SMALLEST,
    Backend,
    EngineLayout,
    Precision,
    Prediction,
    SamplerName,
    Source,
    Steps,
    Target,
    choices,
    random_seed,
    refusal,
)
from hidiff_export.signature import PROMPT_TOKENS
from hidiff_export.tiling import VaeTiles
from hidiff_runtime.phases import PhaseRule, StepRange

_SIDE = f"a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST}."
_INPAINTING_FAMILIES = (Family.SD15, Family.SD21, Family.SDXL)
_CONTROL_FAMILIES = (Family.SD15, Family.SD21, Family.SDXL)
_BUILDS_FOR = {
    Backend.ONNXRUNTIME: "cpu or cuda",
    Backend.TENSORRT: "cuda",
    Backend.TENSORRT_RTX: "generations of GPUs like sm89, or cuda alone",
}


def _also_one(schema: dict[str, Any]) -> None:
    """What is a list may also be written as its only item."""
    item = schema["items"]
    schema["anyOf"] = [item, {"type": schema.pop("type"), "items": schema.pop("items"), "minItems": 1}]


def _default_targets(data: Mapping[str, Any]) -> tuple[Target, ...]:
    return tuple(target for backend in data["backend"] for target in backend.default_targets)


class Recipe(Frozen):
    """What to build: checkpoint, picture, phases, precision, engines and proof.

    Everything is in the recipe's own terms, sizes in pixels. `load` reads YAML, `from_dict` what `to_dict` gave; both
    raise `RecipeError`, building one directly raises pydantic's error.
    """

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
    lora: tuple[LoraFile, ...] = Field(
        default=(),
        description="LoRA files to fuse into the UNet and the bundle's text encoders, added in order: a list of "
        "{path, scale}.",
    )
    prediction: Prediction | None = Field(
        default=None,
        description="What the UNet predicts, for a .safetensors file, which does not say (SD2.1's 768 model and some "
        f"fine-tunes v_prediction): {choices(Prediction)}; by default what comes with the checkpoint, or its family's.",
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
    hidiffusion: HiDiffusion = Field(default=HiDiffusion(), description="A mapping of raunet, windows and thresholds.")
    backend: Annotated[tuple[Backend, ...], ONE_OR_A_LIST, DISTINCT] = Field(
        default=(Backend.ONNXRUNTIME,),
        description=f"What builds and runs the engines, one or a list with the default one first: {choices(Backend)}.",
        json_schema_extra=_also_one,
    )
    targets: Annotated[tuple[Target, ...], ONE_OR_A_LIST, DISTINCT] = Field(
        default_factory=_default_targets,
        description=f"What the engines are for, one or a list: {choices(Target)}; by default what suits the backend: "
        "cpu for onnxruntime, cuda for tensorrt, sm89 and sm120 for tensorrt-rtx.",
        json_schema_extra=_also_one,
    )
    layout: EngineLayout = Field(
        default=EngineLayout.PER_PHASE,
        description="How TensorRT engines hold the phases: per-phase for an engine each, or merged for all in one.",
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
    parity: ParityBounds = Field(
        default=ParityBounds(),
        description="A mapping of call_snr_db and run_snr_db.",
        json_schema_extra=without_default,
    )

    @field_validator("parity")
    @classmethod
    def _bounds_of_the_precision(cls, given: ParityBounds, info: ValidationInfo) -> ParityBounds:
        return given.for_precision(info.data.get("precision", Precision.FLOAT32))

    @model_validator(mode="after")
    def _checkpoint_exists(self) -> Recipe:
        if self.unet_width is Width.TINY and self.random_seed is None:
            raise refusal(
                "is only for fabricated checkpoints",
                key=("unet_width",),
                advice="Leave unet_width out, or set source: random:0.",
            )
        if self.task is Task.INPAINTING and self.family not in _INPAINTING_FAMILIES:
            raise refusal(
                f"has no inpainting checkpoint in the family {self.family.value}",
                key=("task",),
                advice=f"Inpainting has {_named(_INPAINTING_FAMILIES)}; with {self.family.value}, use text-to-image or "
                "image-to-image.",
            )
        if self.task.has_control and self.family not in _CONTROL_FAMILIES:
            raise refusal(
                f"takes no ControlNet in the family {self.family.value}",
                key=("task",),
                advice=f"ControlNet tasks have {_named(_CONTROL_FAMILIES)}.",
            )
        return self

    @model_validator(mode="after")
    def _guidance_is_there(self) -> Recipe:
        if self.guidance_rescale and not self.guidance:
            raise refusal(
                "rescales guidance, which is off",
                key=("guidance_rescale",),
                advice="Set guidance: true, or leave guidance_rescale out.",
            )
        return self

    @model_validator(mode="after")
    def _targets_are_served(self) -> Recipe:
        served = {backend: backend.targets(self.targets) for backend in self.backend}
        for backend, targets in served.items():
            if not targets:
                raise refusal(
                    f"has nothing that {backend.value} builds for",
                    key=("targets",),
                    advice=f"Add {_BUILDS_FOR[backend]} to targets, or leave targets out.",
                )
        for target in self.targets:
            if not any(target in targets for targets in served.values()):
                names = " and ".join(backend.value for backend in self.backend)
                raise refusal(
                    f"has {target.value}, which {names} does not build for",
                    key=("targets",),
                    advice=" ".join(f"{backend.value} builds for {_BUILDS_FOR[backend]}." for backend in self.backend),
                )
        if self.layout is EngineLayout.MERGED and self.backend == (Backend.ONNXRUNTIME,):
            raise refusal(
                "is merged, which only TensorRT engines can be",
                key=("layout",),
                advice="Leave layout out, or set backend: tensorrt or tensorrt-rtx.",
            )
        return self

    @model_validator(mode="after")
    def _targets_compute(self) -> Recipe:
        if self.precision is Precision.BFLOAT16 and Target.CPU in self.targets:
            raise refusal(
                "is bfloat16, for which ONNX Runtime has no kernels on the CPU",
                key=("precision",),
                advice="Set precision: float32 or float16, or targets: cuda.",
            )
        if self.precision is Precision.BFLOAT16 and Target.SM75 in self.targets:
            raise refusal(
                "is bfloat16, for which sm75 has no arithmetic",
                key=("precision",),
                advice="Set precision: float16, or targets from sm80 on.",
            )
        unable = [target.value for target in self.targets if not target.computes_fp8]
        if self.precision is Precision.FP8 and unable:
            raise refusal(
                f"is fp8, for which {' and '.join(unable)} has no arithmetic",
                key=("precision",),
                advice="Set precision: int8 or float16, or targets from sm89 on.",
            )
        return self

    @model_validator(mode="after")
    def _control_fits(self) -> Recipe:
        thresholds = self.hidiffusion.thresholds
        if not self.task.has_control:
            if self.controlnet is not None:
                raise refusal(
                    f"is set, but the task {self.task.value} has no ControlNet",
                    key=("controlnet",),
                    advice="Leave controlnet out, or set task: controlnet.",
                )
            if thresholds is not None and thresholds.control is not None:
                raise refusal(
                    f"is set, but the task {self.task.value} has no ControlNet",
                    key=("hidiffusion", "thresholds", "control"),
                    advice="Leave control out, or set task: controlnet.",
                )
        elif min(control_latent(self.latent_height, self.latent_width)) == 0:
            raise refusal(
                "makes the picture too narrow for a ControlNet, which would see no row or column of it",
                key=("width",),
                advice="Keep the sides' ratio below 16 to 1.",
            )
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
        source = RecipeSource.read(path).overridden(overrides)
        return cls._validated(source.with_default("name", re.sub(r"[^\w.-]+", "-", path.stem)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """The recipe that `to_dict` wrote, for example in a manifest; ``origin`` names it in errors."""
        return cls._validated(RecipeSource.of(data, origin))

    @classmethod
    def _validated(cls, source: RecipeSource) -> Recipe:
        try:
            return cls.model_validate(source.data)
        except ValidationError as error:
            raise recipe_error(error, source, cls) from None

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
        rule = families.phase_rule(self.family, self.task, self.width, self.height)
        given = self.hidiffusion.thresholds
        if given is not None:
            control = rule.control if given.control is None else given.control
            rule = PhaseRule(_step_range(given.strided), _step_range(given.pooled), control)
        return rule if self.hidiffusion.raunet else PhaseRule(control=rule.control)


def _step_range(given: Range | None) -> StepRange | None:
    return None if given is None else StepRange(given.start, given.end)


def _named(members: Iterable[Family]) -> str:
    return ", ".join(member.value for member in members)
