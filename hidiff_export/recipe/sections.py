"""The nested mappings of a recipe: HiDiffusion's switches and thresholds, LoRA files, and the parity bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_serializer,
    field_validator,
    model_validator,
)

from hidiff_export.families.hidiffusion_rules import CONTROL_END
from hidiff_export.recipe.field_types import FRACTION_SCHEMA, MOST_STEPS, Fraction, LoraPath, Precision, refusal
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.reused_features import Reuse


class Frozen(BaseModel):
    """Checked once, never changed, and without keys of one's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def also_fraction(schema: dict[str, Any]) -> None:
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


def lone_end(value: Any) -> Any:
    """Returns what a range is checked from, where a lone fraction may stand for its end."""
    return {"end": value} if isinstance(value, (int, float, str)) and not isinstance(value, bool) else value


class Thresholds(Frozen):
    """When each of HiDiffusion's changes is in force; a change that is left out never is."""

    strided: FractionRange | None = Field(
        default=None,
        description="Steps with the stride-4 downsampler: a ratio like 0.4, or {start: 0, end: 40%}.",
        json_schema_extra=also_fraction,
    )
    pooled: FractionRange | None = Field(
        default=None,
        description="Steps with pooled deep features: a ratio like 0.4, or {start: 16%, end: 40%}.",
        json_schema_extra=also_fraction,
    )
    control: Fraction | None = Field(
        default=None,
        gt=0,
        description="Where ControlNet residuals stop coming in, as a part of the run above 0; left out, "
        f"{CONTROL_END} as published.",
        json_schema_extra=also_fraction,
    )

    @field_validator("strided", "pooled", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Takes a lone fraction for the end of a range that starts with the run, as the paper's T1 and T2 are."""
        return lone_end(value)


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


class ParityBound(NamedTuple):
    """The least signal-to-noise ratio, in decibels, and why it is that."""

    snr_db: float
    reason: str


# Measured on random weights of every family, and on the demo model's trained ones, whose activations are less kind to
# half precision (benchmarks/demo_parity.md). One evaluation, random: 110 to 125 dB in float32, 55 to 61 in float16, 37
# to 42 in bfloat16, every result rounded (the CPU's engines, which round less often, 60 to 66 in float16). Trained, the
# worst step: 114, 46, 28, int8 22 and fp8 18. What is wrong: a single window shift leaves 18 to 47 on random weights, 6
# to 31 on trained ones; another phase's graph 1 to 9 on random ones, and on trained ones 5 to 14 around the phase
# change and up to 22 late in the run. Graphs that round keep to the same bounds as engines: PyTorch's own half
# precision is as far off.
CALL_BOUNDS = {
    Precision.FLOAT32: ParityBound(
        80, "Rounding in another order leaves 110 to 125 dB; one wrong shift gives 47 at most."
    ),
    Precision.FLOAT16: ParityBound(
        40, "11 bits leave 55 dB after a UNet's depth, 46 on trained weights; a wrong phase gives 22 at most."
    ),
    Precision.BFLOAT16: ParityBound(
        25, "8 bits leave 37 dB after a UNet's depth, 28 on trained weights; a wrong phase gives 22 at most."
    ),
    Precision.INT8: ParityBound(
        20, "8 bits over a range leave 27 dB, 22 on trained weights; a wrong phase gives 14 at most at a phase change."
    ),
    Precision.FP8: ParityBound(
        15, "4 significant bits leave 18 to 25 dB, trained or not; a wrong phase gives 14 at most at a phase change."
    ),
}
"""Of one evaluation."""

RUN_BOUNDS = {
    Precision.FLOAT32: ParityBound(
        60, "Steps carry rounding on and guidance multiplies it, which leaves 100 to 115 dB in a short run."
    ),
    Precision.FLOAT16: ParityBound(
        35, "Steps carry rounding on and guidance multiplies it; 35 dB is where a difference stops being visible."
    ),
    Precision.BFLOAT16: ParityBound(
        25, "Steps carry rounding on and guidance multiplies it; with other shifts all through it is below 15 dB."
    ),
    Precision.INT8: ParityBound(
        15, "Steps carry the error on and guidance multiplies it, which leaves 24 dB in a short run."
    ),
    Precision.FP8: ParityBound(
        10, "Steps carry the error on and guidance multiplies it, which leaves 15 dB in a short run."
    ),
}
"""Of a whole run's latents."""


class ForecastSettings(Frozen):
    """Which evaluations are computed where the others are forecast."""

    warm_up: StrictInt = Field(
        default=4, ge=2, le=MOST_STEPS, description="Evaluations at the start that are computed, 2 or more."
    )
    window: StrictFloat = Field(
        default=2.0, ge=1, le=MOST_STEPS, description="After them one of so many is computed, 1 or more, rounded down."
    )
    growth: StrictFloat = Field(
        default=0.5, ge=0, le=MOST_STEPS, description="By how much the window grows each time, 0 or more."
    )
    last: Fraction = Field(
        default=0.1, description="Part of the run at its end that is computed whole: 0 to 1, or a percentage."
    )

    def record(self) -> Forecast:
        """Returns what the manifest says of it."""
        return Forecast(self.warm_up, self.window, self.growth, self.last)


class ReuseSettings(Frozen):
    """How long deep features serve, and how deep they are."""

    every: StrictInt = Field(
        ge=2, le=MOST_STEPS, description="All of the UNet is computed every so many evaluations, 2 or more."
    )
    depth: StrictInt = Field(
        default=1, ge=1, description="Layers at the end of the UNet that are computed between, 1 or more."
    )

    def record(self) -> Reuse:
        """Returns what the manifest says of it."""
        return Reuse(self.every, self.depth)


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
