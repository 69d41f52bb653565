"""How far a number of UNet evaluations has come, told in their own cost, so that the time left is a fair guess."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hidiff_export.families.cost import unet_cost
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.graph_io import shallow_cut
from hidiff_export.recipe import Recipe
from hidiff_runtime.phases import Phase

Progress = Callable[[float, float, str], None]
"""``progress(done, total, note)`` before each evaluation and after the last, in floating-point operations."""


class FlopsProgress:
    """Tells a progress callback how far a number of evaluations of known cost have come."""

    def __init__(self, recipe: Recipe, config: Mapping[str, Any], progress: Progress | None) -> None:
        self._recipe = recipe
        self._config = config
        self._progress = progress
        self._flops: dict[Phase, float] = {}
        self._done = 0.0
        self._total = 0.0
        self._next = 0.0

    def flops(self, phase: Phase) -> float:
        """Returns floating-point operations of one evaluation, kept for each phase: thousands of steps ask."""
        if phase not in self._flops:
            recipe = self._recipe
            size = (recipe.latent_height, recipe.latent_width)
            geometry = UNetGeometry.of(self._config, recipe.unet_layout, phase, *size)
            cut = shallow_cut(self._config, phase, recipe.depth_of(phase))
            cost = unet_cost(self._config, recipe.unet_layout, geometry, cut)
            self._flops[phase] = recipe.batch_of(phase) * float(cost.flops)
        return self._flops[phase]

    def plan(self, phases: Iterable[Phase]) -> None:
        """Adds evaluations, one of each of ``phases``, to what there is to do."""
        self._total += sum(self.flops(phase) for phase in phases)

    def start(self, phase: Phase, note: str) -> None:
        """Begins an evaluation, and ends the one before."""
        self._begin(self.flops(phase), note)

    def note(self, note: str) -> None:
        """Begins something that is not counted, for it takes little beside the evaluations."""
        self._begin(0.0, note)

    def end(self) -> None:
        """Ends the last evaluation."""
        self._begin(0.0, "done")

    def _begin(self, flops: float, note: str) -> None:
        self._done += self._next
        self._next = flops
        if self._progress is not None:
            self._progress(self._done, self._total, note)
