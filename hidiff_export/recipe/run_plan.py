"""What a recipe comes to: its phases, their step ranges and sizes, and what they cost. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hidiff_export.families.cost import Cost, controlnet_cost, stock_geometry, unet_cost
from hidiff_export.families.geometry import UNetGeometry, control_latent
from hidiff_export.families.graph_io import shallow_cut
from hidiff_export.recipe import Recipe
from hidiff_runtime.format.left_out import phases_of_steps
from hidiff_runtime.phases import Phase, PhasePlan, PhaseSpan

USUAL_STEPS = 50


@dataclass(frozen=True)
class PlannedPhase:
    """Those of a span's steps that compute the same layers.

    Args:
        span: the steps, and their phase with all layers computed.
        phase: with the layers that are.
        geometry: of the UNet in this phase.
        flops: floating-point operations of one step for one latent, the ControlNet's included where it joins in.
        batched_flops: the same for a whole evaluation, the recipe's batch and guidance included.
        computed: how many of the span's steps compute these, and are not forecast.
    """

    span: PhaseSpan
    phase: Phase
    geometry: UNetGeometry
    flops: int
    batched_flops: int
    computed: int

    @property
    def run_flops(self) -> int:
        """Of all the span's steps together."""
        return self.batched_flops * self.computed

    @property
    def feature_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the feature maps on the way down, each size once."""
        sizes = [(height, width) for _, height, width in self.geometry.skips]
        return tuple(dict.fromkeys(sizes))


@dataclass(frozen=True)
class RunPlan:
    """A run of ``steps`` logical denoising steps.

    Raises:
        InputError: ``steps`` is not a positive whole number.
    """

    recipe: Recipe
    steps: int

    @cached_property
    def phases(self) -> tuple[PlannedPhase, ...]:
        """The phases that run, in running order, each before its shallow one."""
        return tuple(planned for span in self._spans for planned in self._planned(span))

    @property
    def _spans(self) -> tuple[PhaseSpan, ...]:
        return PhasePlan(self.recipe.phase_rule(), self.steps).spans

    def _planned(self, span: PhaseSpan) -> Iterator[PlannedPhase]:
        recipe, config = self.recipe, self.recipe.unet_config()
        geometry = UNetGeometry.of(config, recipe.unet_layout, span.phase, recipe.latent_height, recipe.latent_width)
        every = self._phases_of_steps[span.first : span.last + 1]
        for phase in (span.phase, replace(span.phase, shallow=True)):
            if phase.shallow and phase not in every:
                continue
            cut = shallow_cut(config, phase, recipe.depth_of(phase))
            flops = unet_cost(config, recipe.unet_layout, geometry, cut).flops
            flops += self.controlnet.flops if phase.control else 0
            yield PlannedPhase(span, phase, geometry, flops, flops * recipe.batch_of(phase), every.count(phase))

    @cached_property
    def _phases_of_steps(self) -> tuple[Phase | None, ...]:
        return phases_of_steps(self.recipe.phase_rule(), self.recipe.forecast_record, self.steps)

    @cached_property
    def computed(self) -> tuple[bool, ...]:
        """Which steps are computed, and not forecast: of a sampler that evaluates the UNet once a step."""
        return tuple(phase is not None for phase in self._phases_of_steps)

    @cached_property
    def controlnet(self) -> Cost:
        """Of the ControlNet, evaluated for one latent; nothing where the bundle has none."""
        recipe = self.recipe
        if recipe.controlnet is None:
            return Cost()
        size = control_latent(recipe.latent_height, recipe.latent_width)
        return controlnet_cost(recipe.controlnet_config(), recipe.unet_config(), recipe.unet_layout, *size)

    @cached_property
    def run_flops(self) -> int:
        """Of the whole run."""
        return sum(phase.run_flops for phase in self.phases)

    @cached_property
    def stock(self) -> Cost:
        """Of the UNet without HiDiffusion, evaluated for one latent."""
        recipe, config = self.recipe, self.recipe.unet_config()
        stock = stock_geometry(config, recipe.unet_layout, recipe.latent_height, recipe.latent_width)
        return unet_cost(config, *stock)

    @property
    def stock_run_flops(self) -> int:
        """Of the run with the UNet as it was published, ControlNet included."""
        controlled = sum(span.steps for span in self._spans if span.phase.control)
        per_latent = self.steps * self.stock.flops + controlled * self.controlnet.flops
        return per_latent * self.recipe.model_batch

    @property
    def saving(self) -> float:
        """How many times fewer operations than the stock UNet."""
        return self.stock_run_flops / self.run_flops

    @property
    def weight_bytes(self) -> int:
        """Of the UNet's weights, which every phase shares, and of the ControlNet's."""
        return (self.stock.parameters + self.controlnet.parameters) * self.recipe.precision.bytes

    @property
    def latent_bytes(self) -> int:
        """Of the batch's latents, which stay float32."""
        channels, height, width = self.recipe.latent_shape
        return self.recipe.batch * channels * height * width * 4

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON types; operations in TFLOPs, sizes in bytes."""
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "family": recipe.family.value,
            "task": recipe.task.value,
            "width": recipe.width,
            "height": recipe.height,
            "steps": self.steps,
            "computed_steps": sum(self.computed),
            "phases": [_span_json(span) for span in self._spans],
            "batch": recipe.batch,
            "model_batch": recipe.model_batch,
            "precision": recipe.precision.value,
            "latent": list(recipe.latent_shape),
            "latent_bytes": self.latent_bytes,
            "parameters": self.stock.parameters,
            "controlnet_parameters": self.controlnet.parameters,
            "weight_bytes": self.weight_bytes,
            "costs": [_cost_json(phase) for phase in self.phases],
            "tflops": {
                "run": _tera(self.run_flops),
                "stock_run": _tera(self.stock_run_flops),
                "stock_evaluation": _tera(self.stock.flops),
                "controlnet_evaluation": _tera(self.controlnet.flops),
            },
            "saving": round(self.saving, 3),
        }


def default_steps(recipe: Recipe) -> int:
    """Returns the steps a plan is shown for when none are asked for: 50, or else the most that the recipe tabulates."""
    return USUAL_STEPS if USUAL_STEPS in recipe.steps else recipe.steps[-1]


def _span_json(span: PhaseSpan) -> dict[str, Any]:
    return {
        "kind": span.phase.kind.value,
        "control": span.phase.control,
        "unguided": span.phase.unguided,
        "first": span.first,
        "last": span.last,
        "steps": span.steps,
    }


def _cost_json(phase: PlannedPhase) -> dict[str, Any]:
    """Returns one phase's sizes and cost, in the order of ``phases``, each before its shallow one."""
    return {
        "phase": phase.phase.name,
        "computed_steps": phase.computed,
        "feature_sizes": [list(size) for size in phase.feature_sizes],
        "windows": [list(window.window) for window in phase.geometry.windows],
        "tflops_latent": _tera(phase.flops),
        "tflops_evaluation": _tera(phase.batched_flops),
        "tflops_run": _tera(phase.run_flops),
    }


def _tera(flops: int) -> float:
    return flops / 1e12
