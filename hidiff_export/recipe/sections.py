"""The nested mappings of a recipe: HiDiffusion's switches and thresholds, and the parity bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    field_serializer,
    field_validator,
    model_validator,
)

from hidiff_export.families.hidiffusion_rules import CONTROL_END
from hidiff_export.recipe.field_types import FRACTION_SCHEMA, Fraction, LoraPath, Precision, refusal
from hidiff_export.recipe.parity_bounds import CALL_BOUNDS, RUN_BOUNDS, ParityBound


class Frozen(BaseModel):
    """Checked once, never changed, and without keys of one's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _also_fraction(schema: dict[str, Any]) -> None:
    kinds = [kind for kind in schema["anyOf"] if "$ref" in kind]
    schema["anyOf"] = [*kinds, *FRACTION_SCHEMA]
    del schema["default"]


def _also_published(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [schema["anyOf"][0], {"const": "published"}]
    schema["default"] = "published"


def without_default(schema: dict[str, Any]) -> None:
    """Removes a default that the precision decides, so that editors do not offer one."""
    del schema["default"]


class FractionRange(Frozen):
    """The steps from ``start`` to before ``end``, as fractions of the run."""

    start: Fraction = Field(default=0.0, description="First step, as a part of the run: 0 to 1, or a percentage.")
    end: Fraction = Field(description="Where it ends, as a part of the run: 0 to 1, or a percentage like 40%.")

    @model_validator(mode="after")
    def _rises(self) -> FractionRange:
        if self.start >= self.end:
            raise refusal("ends before it starts", advice="Give a start below the end, like {start: 0, end: 40%}.")
        return self


class Thresholds(Frozen):
    """When each of HiDiffusion's changes is in force; a change that is left out never is."""

    strided: FractionRange | None = Field(
        default=None,
        description="Steps with the stride-4 downsampler: a ratio like 0.4, or {start: 0, end: 40%}.",
        json_schema_extra=_also_fraction,
    )
    pooled: FractionRange | None = Field(
        default=None,
        description="Steps with pooled deep features: a ratio like 0.4, or {start: 16%, end: 40%}.",
        json_schema_extra=_also_fraction,
    )
    control: Fraction | None = Field(
        default=None,
        gt=0,
        description="Where ControlNet residuals stop coming in, as a part of the run above 0; left out, "
        f"{CONTROL_END} as published.",
        json_schema_extra=_also_fraction,
    )

    @field_validator("strided", "pooled", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Takes a lone fraction for the end of a range that starts with the run, as the paper's T1 and T2 are."""
        return {"end": value} if isinstance(value, (int, float, str)) and not isinstance(value, bool) else value


class HiDiffusionSettings(Frozen):
    """Which of HiDiffusion's changes are made, and when."""

    raunet: StrictBool = Field(default=True, description="Shrink deep feature maps in early steps: true or false.")
    windows: StrictBool = Field(default=True, description="Shifted-window attention in the top blocks: true or false.")
    thresholds: Thresholds | None = Field(
        default=None,
        description="`published`, or a mapping of strided, pooled and control.",
        json_schema_extra=_also_published,
    )

    @field_validator("thresholds", mode="before")
    @classmethod
    def _published(cls, value: Any) -> Any:
        return None if value == "published" else value

    @field_serializer("thresholds")
    def _written(self, thresholds: Thresholds | None) -> Any:
        return "published" if thresholds is None else thresholds

    @model_validator(mode="after")
    def _consistent(self) -> HiDiffusionSettings:
        given = self.thresholds
        if not self.raunet and given is not None and (given.strided or given.pooled):
            raise refusal(
                "gives steps for a change that is switched off",
                key=("hidiffusion", "thresholds"),
                advice="Set raunet: true, or leave strided and pooled out.",
            )
        return self


class LoraSource(Frozen):
    """A LoRA that is fused into the weights, and how strongly."""

    path: LoraPath = Field(
        description="The .safetensors file: of kohya's trainer, LyCORIS, OneTrainer, diffusers or PEFT."
    )
    scale: StrictFloat = Field(
        default=1.0,
        ge=-100,
        le=100,
        description="What its additions are multiplied by, beside its own alpha: -100 to 100.",
    )


def _each(bounds: Mapping[Precision, ParityBound]) -> str:
    return ", ".join(f"{bound.snr_db:g} for {precision.value}" for precision, bound in bounds.items())


class ParityBounds(Frozen):
    """How close to PyTorch the bundle has to be; what is not given follows from the precision."""

    call_snr_db: StrictFloat = Field(
        default=CALL_BOUNDS[Precision.FLOAT32].snr_db,
        json_schema_extra=without_default,
        ge=10,
        le=200,
        description=f"Least signal-to-noise ratio of one evaluation in dB, 10 to 200; by default {_each(CALL_BOUNDS)}.",
    )
    run_snr_db: StrictFloat = Field(
        default=RUN_BOUNDS[Precision.FLOAT32].snr_db,
        json_schema_extra=without_default,
        ge=10,
        le=200,
        description="Least signal-to-noise ratio of a whole run's latents in dB, 10 to 200; by default "
        f"{_each(RUN_BOUNDS)}.",
    )

    def for_precision(self, precision: Precision) -> ParityBounds:
        """Returns these bounds, with what was not given set for ``precision``."""
        table = {"call_snr_db": CALL_BOUNDS, "run_snr_db": RUN_BOUNDS}
        defaults = {key: float(bounds[precision].snr_db) for key, bounds in table.items()}
        return self.model_copy(update={key: db for key, db in defaults.items() if key not in self.model_fields_set})
