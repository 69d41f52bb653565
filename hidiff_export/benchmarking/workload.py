"""What every contender of a size computes: the phases of a run, their operations, and the same seeded inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hidiff_export.benchmarking.savings import rules
from hidiff_export.families.cost import stock_geometry, unet_cost
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.graph_io import phase_inputs, shallow_cut
from hidiff_export.recipe import Recipe
from hidiff_export.reference.random_inputs import arrays, random_inputs
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.format.left_out import phases_of_steps
from hidiff_runtime.format.specs import TensorSpec
from hidiff_runtime.phases import Phase, PhaseRule
from hidiff_runtime.sampling.torch_rng import TorchGenerator, draw_window_shifts

TIMESTEPS = (981, 501, 1)
"""Of the evaluations, in turn: the first, the middle and the last of a run, whose inputs differ most in size."""


@dataclass(frozen=True)
class PlannedEvaluation:
    """One kind of evaluation of a run.

    Args:
        phase: of the UNet.
        count: evaluations of the run in it, where nothing is forecast.
        flops: of one evaluation, the whole batch and guidance included.
        inputs: of the phase's graph.
    """

    phase: Phase
    count: int
    flops: int
    inputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Workload:
    """A run of one size.

    Args:
        recipe: of this size and batch alone.
        steps: of the run.
    """

    recipe: Recipe
    steps: int

    @property
    def size(self) -> str:
        """Width and height in pixels: ``1024x1024``."""
        return f"{self.recipe.width}x{self.recipe.height}"

    @cached_property
    def phases(self) -> tuple[PlannedEvaluation, ...]:
        """The phases that the run has, in running order; those too that it has where it leaves out less."""
        return tuple(self._planned())

    @property
    def rule(self) -> PhaseRule:
        """When each phase runs, with all that the recipe leaves out."""
        return self.recipe.phase_rule()

    @cached_property
    def stock_flops(self) -> int:
        """Of one evaluation of the UNet without HiDiffusion."""
        recipe, config = self.recipe, self.recipe.unet_config()
        stock = stock_geometry(config, recipe.unet_layout, recipe.latent_height, recipe.latent_width)
        return unet_cost(config, *stock).flops * recipe.model_batch

    def count(self, phase: str, rule: PhaseRule, forecast: Forecast | None = None) -> int:
        """Returns how many evaluations of a phase the run computes by a rule, where others are forecast."""
        every = phases_of_steps(rule, forecast, self.steps)
        return sum(each is not None and each.name == phase for each in every)

    def step_of(self, phase: Phase) -> int:
        """Returns the first step of a phase, in a run that has it."""
        runs = (phases_of_steps(rule, None, self.steps) for rule in rules(self.rule))
        return next(run.index(phase) for run in runs if phase in run)

    def phases_of(self, *, bundle: bool) -> tuple[PlannedEvaluation, ...]:
        """Returns the phases that a contender is measured in: one that is no bundle leaves nothing out."""
        whole = self.rule.whole.phases()
        return tuple(planned for planned in self.phases if bundle or planned.phase in whole)

    def write_inputs(self, folder: Path) -> None:
        """Writes each phase's inputs at each of `TIMESTEPS`, where `inputs_file` says."""
        for planned in self.phases:
            for index in range(len(TIMESTEPS)):
                given: dict[str, Any] = {**self._inputs(planned, index)}
                np.savez(inputs_file(folder, planned.phase.name, index), **given)

    def _planned(self) -> Iterator[PlannedEvaluation]:
        recipe, config = self.recipe, self.recipe.unet_config()
        size = (recipe.latent_height, recipe.latent_width)
        runs = [phases_of_steps(rule, None, self.steps) for rule in rules(self.rule)]
        every = phases_of_steps(self.rule, None, self.steps)
        for phase in sorted(
            {phase for run in runs for phase in run if phase is not None}, key=self.rule.phases().index
        ):
            geometry = UNetGeometry.of(config, recipe.unet_layout, phase, *size)
            batch, options = recipe.batch_of(phase), recipe.phase_options(phase)
            cut = shallow_cut(config, phase, recipe.depth_of(phase))
            flops = unet_cost(config, recipe.unet_layout, geometry, cut).flops * batch
            specs = phase_inputs(config, recipe.unet_layout, phase, *size, batch, **options)
            yield PlannedEvaluation(phase, every.count(phase), flops, specs)

    def _inputs(self, planned: PlannedEvaluation, index: int) -> dict[str, NDArray[Any]]:
        """Returns inputs at one timestep; window shifts are those that torch draws after it was seeded with it."""
        recipe, timestep = self.recipe, TIMESTEPS[index]
        size = {"width": recipe.width, "height": recipe.height}
        given: dict[str, NDArray[Any]] = {
            **arrays(random_inputs(planned.inputs, timestep=float(timestep), seed=timestep, **size))
        }
        for spec in planned.inputs:
            if spec.name == "window_shifts":
                shifts = draw_window_shifts(TorchGenerator(timestep), spec.shape[-1])
                given[spec.name] = np.broadcast_to(shifts, spec.shape).copy()
        return given


def inputs_file(folder: Path, phase: str, index: int) -> Path:
    """Returns the file of a phase's inputs at the timestep of this index."""
    return folder / f"{phase}-{index}.npz"
